"""Sources that would give plausible nonsense, and settings that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import api
from streamconv.cli.main import main
from streamconv.errors import RefusedError, StreamconvError
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied(folder: Path, head: str) -> Path:
    """A model that says it is tied and holds an lm_head: "copy", "other", or "near": one element differs."""
    weights = tiny.tensors()
    if head != "other":
        weights[HEAD] = weights[EMBEDDING].copy()
    if head == "near":
        weights[HEAD][0, 0] += 1
    return tiny.write(folder, weights, tiny.config(tie_word_embeddings=True))


@pytest.mark.parametrize(("head", "warned"), [("copy", False), ("other", True), ("near", True)])
def test_a_tied_model_with_another_head(tmp_path: Path, capfd: pytest.CaptureFixture[str], head: str, warned: bool) -> None:
    """1.2 stores the embedding all the same, so it must be said."""
    model = tied(tmp_path / "in", head)
    assert main(["convert", str(model), str(tmp_path / "out"), "--quiet"]) == 0
    assert ("lm_head.weight is not the embedding, to which config.json ties it" in capfd.readouterr().err) == warned
    made = load_file(tmp_path / "out" / "rank0.safetensors")
    assert torch.equal(made["lm_head.weight"], made["transformer.vocab_embedding.weight"])
    index, plan = api.open_and_plan(model, TensorRTLLM(target_version="0.16"))
    with index:
        assert not [line for line in plan.warnings if "lm_head" in line]  # that version takes the file's


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("quant", [{}, {"quant": "int8", "target_sm": 80}, {"quant": "fp8_rowwise"}])
def test_codes_without_scales(tmp_path: Path, dtype: torch.dtype, quant: dict[str, object]) -> None:
    folder = tiny.write(tmp_path / "in")
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if "mlp" in name]:
        held[name] = (held[name] * 50).to(dtype)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.mlp\.down_proj\.weight \(and 5 more\): .* weights need scales"):
        api.open_and_plan(folder, TensorRTLLM(**quant))[0].close()  # type: ignore[arg-type]


def test_a_gpu_without_the_kernels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(tiny.write(tmp_path / "in")), "--quant", "fp8_rowwise", "--target-sm"]
    assert main([*arguments, "80"]) == 0
    said = capfd.readouterr()
    assert "need SM 89 or later, not 80" in said.out + said.err
    assert main([*arguments, "89"]) == 0
    said = capfd.readouterr()
    assert "need SM 89" not in said.out + said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-position-embeddings", "-5"], "--max-position-embeddings -5 must be at least 1"),
        (["--max-position-embeddings", "0"], "--max-position-embeddings 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    model = tiny.write(tmp_path / "in")
    assert main(["convert", str(model), str(tmp_path / "out"), *flags]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrapper_ties_the_head_of_its_language_model(tmp_path: Path) -> None:
    """The outer tie_word_embeddings is the one that transformers obeys."""
    weights = {f"model.language_{name}": held for name, held in tiny.tensors().items() if "lm_head" not in name}
    inner = tiny.config(tie_word_embeddings=False) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": inner}
    report = streamconv.plan(tiny.write(tmp_path / "tied", weights, outer | {"tie_word_embeddings": True}))
    assert any("there is no lm_head.weight" in line for line in report.warnings)
    with pytest.raises(StreamconvError, match=r"lm_head\.weight"):
        streamconv.plan(tiny.write(tmp_path / "untied", weights, outer | {"tie_word_embeddings": False}))
