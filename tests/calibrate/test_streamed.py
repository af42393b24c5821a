"""Ranges measured layer by layer equal those of hooks on the whole model, bit for bit on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from streamconv.calibration.run import calibrate  # noqa: E402
from streamconv.cli.main import main  # noqa: E402
from tests import tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [f"w{number}" for number in range(tiny.VOCAB - 2)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model with a word-level tokenizer beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tiny.write(tmp_path / "model", tiny.tensors(dtype="float16"))
    vocab = {"<unk>": 0, "</s>": 1} | {word: number + 2 for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"})
    )
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    blocks = [" ".join(WORDS[(i * 7 + j * 13) % len(WORDS)] for j in range(5 + 3 * i)) for i in range(6)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(blocks))
    return path


def whole(folder: Path, text: Path, dtype: Any, device: str = "cpu") -> dict[str, Any]:
    """The official loop: the whole model, hooks on every linear module, one sample at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval().to(device)
    found: dict[str, Any] = {}

    def keep(key: str, values: Any) -> None:
        top = values.reshape(-1, values.shape[-1]).abs().max(dim=0)[0].float()
        found[key] = torch.maximum(found[key], top) if key in found else top

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def hook(_: Any, inputs: Any, output: Any, name: str = name) -> None:
                keep(f"{name}.x", inputs[0])
                keep(f"{name}.y", output)

            module.register_forward_hook(hook)
    with torch.no_grad():
        for block in text.read_text().split("\n\n"):
            ids = tokenizer((block + " TL;DR: ").strip().replace(" n't", "n't"), truncation=True, max_length=16)["input_ids"]
            model(torch.tensor([ids], device=device))
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equal_to_hooks_on_the_whole_model(model: Path, text: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "ranges.safetensors"
    told = calibrate(model, out, str(text), max_length=16, dtype=dtype, device="cpu")
    got = load_file(out)
    want = whole(model, text, getattr(torch, dtype))
    assert told["samples"] == 6
    assert set(want) == {key for key in got if not key.endswith(".w")}
    for key, values in want.items():
        assert torch.equal(values, got[key]), key
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def become(folder: Path, kind: str) -> None:
    """Turn the tiny model into one that scales its embedding, or whose layers attend in different ways."""
    settings = tiny.config(architectures=[f"{kind.title()}ForCausalLM"], model_type=kind, head_dim=tiny.HIDDEN // tiny.HEADS)
    if kind == "granite":
        settings |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 4.0}
    if kind == "qwen2":  # layer 0 attends to all, layer 1 to a window
        settings |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        weights = tiny.tensors(dtype="float16")
        for name in [name for name in weights if ".self_attn." in name and ".o_proj" not in name]:
            weights[name.replace(".weight", ".bias")] = weights[name][:, 0].copy()
        tiny.write(folder, weights)
        from tokenizers import Tokenizer, models

        characters = ["<|endoftext|>", "Ġ", *"w0123456789TLDR:;"]  # transformers wants this family's own kind of tokenizer
        Tokenizer(models.BPE({c: number for number, c in enumerate(characters)}, [])).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(settings))


KINDS = ["granite", "gemma", "qwen2"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_scale_their_embedding_or_mix_layers(model: Path, text: Path, tmp_path: Path, kind: str) -> None:
    become(model, kind)
    out = tmp_path / "ranges.safetensors"
    calibrate(model, out, str(text), max_length=16, dtype="float32", device="cpu")
    got = load_file(out)
    for key, values in whole(model, text, torch.float32).items():
        assert torch.equal(values, got[key]), key


def test_resumes_after_a_layer(model: Path, text: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    calibrate(model, whole, str(text), max_length=16, device="cpu")

    class Stopped(Exception):
        pass

    def stop(layer: int, layers: int, left: float) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        calibrate(model, out, str(text), max_length=16, device="cpu", progress=stop)
    assert not out.exists()
    seen: list[int] = []
    calibrate(model, out, str(text), max_length=16, device="cpu", progress=lambda layer, layers, left: seen.append(layer))
    assert seen == [2]
    assert out.read_bytes() == whole.read_bytes()


def test_a_tokenizer_that_makes_no_tokens(model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    become(model, "qwen2")
    text.write_text("ääää")
    arguments = ["calibrate", str(model), "-o", str(tmp_path / "r.safetensors"), "--text", str(text), "--loop", "modelopt"]
    assert main(arguments) == 2
    assert "makes no tokens of it" in capfd.readouterr().err


@pytest.mark.parametrize("there", ["text", "model", "folder"])
def test_only_ranges_are_replaced(model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], there: str) -> None:
    out = tmp_path / "r.safetensors"
    if there == "folder":
        out.mkdir()
    else:
        out.write_bytes(b"mine" if there == "text" else (model / "model.safetensors").read_bytes())
    arguments = ["calibrate", str(model), "-o", str(out), "--text", str(text), "--max-length", "8", "--device", "cpu", "--quiet"]
    before = out.read_bytes() if out.is_file() else None
    assert main(arguments) == 6
    assert "holds no activation ranges" in capfd.readouterr().err
    assert before is None or out.read_bytes() == before
    if before is not None:
        out.unlink()
        assert main(arguments) == 0
        assert main(arguments) == 0  # its own are


@pytest.mark.parametrize(
    ("spoil", "status", "says"),
    [("no text", 2, "does not exist"), ("no tokenizer", 3, "no tokenizer"), ("little memory", 5, "calibration takes about")],
)
def test_mistakes(
    model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: str, status: int, says: str
) -> None:
    source, more = str(text), []
    if spoil == "no text":
        source = str(tmp_path / "none.txt")
    elif spoil == "no tokenizer":
        for path in model.glob("tokenizer*"):
            path.unlink()
    else:
        more = ["--memory-budget", "100MiB"]
    assert main(["calibrate", str(model), "-o", str(tmp_path / "r.safetensors"), "--text", source, *more]) == status
    assert says in capfd.readouterr().err
