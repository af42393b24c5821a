"""`verify --source`: what the format does to hard values is no fault, and what was changed afterwards is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from streamconv import api
from streamconv.cli.main import main
from streamconv.errors import UsageError
from streamconv.run import manifest
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification import measured
from streamconv.verification.check import Verdict, verify
from tests import tiny
from tests.crash.world import write_model

WEIGHT = "model.layers.0.mlp.up_proj.weight"
STORED = "transformer.layers.0.mlp.gate"
INT8: dict[str, Any] = {"quant": "int8", "target_sm": 90}


def written(folder: Path, change: dict[tuple[str, int, int], float], dtype: str = "float32") -> Path:
    weights = tiny.tensors(dtype=dtype)
    for (name, row, col), value in change.items():
        weights[name][(row, col) if weights[name].ndim > 1 else row] = value
    return tiny.write(folder, weights, tiny.config(torch_dtype=dtype))


def seen(tmp_path: Path, change: dict[tuple[str, int, int], float], **options: Any) -> Verdict:
    source = written(tmp_path / "in", change)
    api.convert(source, tmp_path / "out", TensorRTLLM(**options))
    return verify(tmp_path / "out", source)


def test_a_value_that_overflows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verdict = seen(tmp_path, {(WEIGHT, 3, 5): 1e6}, dtype="float16")
    assert not verdict.problems
    assert [line for line in verdict.warnings if "1 values are not finite" in line]
    assert main(["verify", str(tmp_path / "out"), "--source", str(tmp_path / "in"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["ok"] and told["values_checked"]


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    verdict = seen(tmp_path, {(name, 3, 5): value})
    assert not verdict.problems
    assert len([line for line in verdict.warnings if "are not finite" in line]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quant", [INT8, {"quant": "fp8_rowwise"}, {"quant": "int4", "target_sm": 80}])
def test_allowed_in_a_quantized_weight(tmp_path: Path, value: float, quant: dict[str, Any]) -> None:
    assert not seen(tmp_path, {(WEIGHT, 3, 5): value}, dtype="float16", allow_nonfinite=True, **quant).problems


def test_rows_that_an_outlier_takes_to_zero(tmp_path: Path) -> None:
    """One outlier a row, and every other value of it is less than half a step."""
    change = {(WEIGHT, row, 0): 1e4 for row in range(tiny.INTER)}
    assert not seen(tmp_path, change, tp_size=2, dtype="float16", **INT8).problems


def damaged(tmp_path: Path, change: Any, name: str, **options: Any) -> Verdict:
    """The output with a tensor changed, and a manifest that agrees: only the values tell."""
    source = written(tmp_path / "in", {(WEIGHT, 3, 5): float("inf")} if "quant" not in options else {})
    out = tmp_path / "out"
    api.convert(source, out, TensorRTLLM(**options))
    file = out / "rank0.safetensors"
    held, data = load_file(file), bytearray(file.read_bytes())
    new = change(held[name]).to(held[name].dtype).contiguous().view(torch.uint8).numpy().tobytes()
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    assert end - begin == len(new) and data[start + begin : start + end] != new
    data[start + begin : start + end] = new
    file.write_bytes(data)
    told = manifest.load(out)
    assert told is not None
    index, plan = api.open_and_plan(source, TensorRTLLM(**options))
    with index:
        told.hashes[file.name][name] = xxhash.xxh3_128(new).hexdigest()
        (out / manifest.NAME).write_bytes(b"".join(manifest.build(plan, [told.hashes[held.name].values() for held in plan.files])))
    return verify(out, source)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: -t,
        lambda t: torch.cat(t.chunk(2)[::-1]),
        lambda t: t * 0,
        lambda t: torch.from_numpy(np.where(np.isinf(t.numpy()), 1.0, t.numpy())),
        lambda t: torch.where(torch.isinf(t), float("nan"), t),
        lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 7, float("nan"), t),
    ],
)
def test_damage_is_found_beside_an_infinity(tmp_path: Path, change: Any) -> None:
    assert damaged(tmp_path, change, STORED + ".weight").problems


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (STORED + ".per_channel_scale", lambda t: t * 2),
        (STORED + ".per_channel_scale", lambda t: -t),
        (STORED + ".weight", lambda t: t.roll(64, -1)),
        (STORED + ".weight", lambda t: t * 0),
    ],
)
def test_damage_of_a_quantized_weight_is_found(tmp_path: Path, name: str, change: Any) -> None:
    assert damaged(tmp_path, change, name, **INT8).problems


FORMATS: dict[str, dict[str, Any]] = {"none": {}, "int8": INT8, "int4": {"quant": "int4", "target_sm": 80}}
FORMATS["fp8_rowwise"] = {"quant": "fp8_rowwise"}
SCALE = STORED + ".per_channel_scale"


def _ulp(t: torch.Tensor) -> torch.Tensor:
    """One scale in the middle is the next larger number."""
    bits = t.clone().view({2: torch.int16, 4: torch.int32}[t.element_size()])
    bits[len(bits) // 2] += 1
    return bits.view(t.dtype)


def _one(t: torch.Tensor) -> torch.Tensor:
    made = t.clone()
    made.view(-1).view(torch.int8)[777] ^= 1
    return made


SPOILT: dict[str, Any] = {
    "reversed": (SCALE, lambda t: t.flip(0)), "half as large again": (SCALE, lambda t: t * 1.5), "zero": (SCALE, lambda t: t * 0),
    "an ulp": (SCALE, _ulp), "one integer": (STORED + ".weight", _one),
}  # fmt: skip


@pytest.mark.parametrize("quant", ["int8", "int4", "fp8_rowwise"])
@pytest.mark.parametrize("what", SPOILT)
def test_every_byte_of_a_quantized_weight_counts(tmp_path: Path, what: str, quant: str) -> None:
    name, change = SPOILT[what]
    problems = damaged(tmp_path, change, name, **FORMATS[quant]).problems
    assert len(problems) == 1 and problems[0].startswith(f"rank0.safetensors: {name}: ") and "SNR" in problems[0], problems
    if what == "an ulp":
        assert "1 of" in problems[0] and f"the first in row {tiny.INTER // 2} of {tiny.INTER}" in problems[0]


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.ln_f.weight", "transformer.layers.1.attention.qkv.weight"])
def test_every_byte_of_an_unquantized_tensor_counts(tmp_path: Path, name: str) -> None:
    problems = damaged(tmp_path, lambda t: torch.cat([t[:-1], (t[-1:] * 1.001).to(t.dtype)]), name).problems
    assert len(problems) == 1 and f"{name}: " in problems[0]


def _heads(weights: dict[str, Any], name: str) -> None:
    size = tiny.HIDDEN // tiny.HEADS
    weights[name] = np.roll(weights[name], size, 0)


def _exchange(weights: dict[str, Any]) -> None:
    at = "model.layers.0.self_attn."
    weights[f"{at}k_proj.weight"], weights[f"{at}v_proj.weight"] = weights[f"{at}v_proj.weight"], weights[f"{at}k_proj.weight"]


def _tune(weights: dict[str, Any], share: float = 0.6) -> None:
    random = np.random.default_rng(5)
    for name, held in weights.items():
        weights[name] = (held + share * 0.05 * random.normal(size=held.shape)).astype(held.dtype)


def _zero(weights: dict[str, Any]) -> None:
    weights[WEIGHT][9] = 0


def _value(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][-1, -1] *= 2


OTHERS: dict[str, Any] = {
    "K and V exchanged": (_exchange, ["attention.qkv"]),
    "Q heads exchanged": (lambda w: _heads(w, "model.layers.1.self_attn.q_proj.weight"), ["attention.qkv"]),
    "a row of zeros": (_zero, ["mlp.gate"]),
    "fine-tuned": (_tune, ["mlp.fc", "attention.dense", "lm_head", "vocab_embedding", "ln_f"]),
    "fine-tuned a little": (lambda w: _tune(w, 0.02), ["mlp.fc", "attention.dense", "lm_head"]),
    "one value": (_value, ["mlp.proj"]),
}


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_with_equal_headers(tmp_path: Path, other: str, quant: str) -> None:
    """Of our own checkpoints every difference is found; of another tool's too, where the format does not swallow it."""
    change, named = OTHERS[other]
    weights = tiny.tensors()
    api.convert(tiny.write(tmp_path / "in", weights), tmp_path / "out", TensorRTLLM(tp_size=2, **FORMATS[quant]))
    change(weights)
    verdict = verify(tmp_path / "out", tiny.write(tmp_path / "other", weights))
    swallowed = other == "one value" and quant != "none"  # int4 may round both to one integer
    assert swallowed or all(any(f"{name}.weight: " in line for line in verdict.problems) for name in named), verdict.problems
    (tmp_path / "out" / manifest.NAME).unlink()
    foreign = verify(tmp_path / "out", tmp_path / "other")
    assert swallowed or all(any(f"{name}.weight: " in line for line in foreign.problems) for name in named), foreign.problems


def test_another_tool_may_round_otherwise(tmp_path: Path) -> None:
    """Scales one unit off: legal in another tool's checkpoint, within the error of the format, and said."""
    assert damaged(tmp_path, _ulp, SCALE, **INT8).problems
    (tmp_path / "out" / manifest.NAME).unlink()
    verdict = verify(tmp_path / "out", tmp_path / "in")
    assert not verdict.problems and any("1 tensors are other bytes" in line for line in verdict.warnings)


@pytest.mark.parametrize("options", [{"target_sm": 80}, {"target_sm": 90}, {"target_sm": 90, "target_version": "0.16"}], ids=str)
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_layout_is_found(quant: str, options: dict[str, Any], tmp_path: Path) -> None:
    """config.json does not tell the GPU generation, and layouts are alike where a matrix has 64 inputs."""
    config = tiny.config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    weights = {name: np.ascontiguousarray(value[tuple(slice(64 if size == 128 else size) for size in value.shape)])
               for name, value in tiny.tensors().items()}  # fmt: skip
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = np.ascontiguousarray(weights[name][:32])
    api.convert(tiny.write(tmp_path / "in", weights, config), tmp_path / "out", TensorRTLLM(quant=quant, **options))
    (tmp_path / "out" / manifest.NAME).unlink()
    verdict = verify(tmp_path / "out", tmp_path / "in")
    assert not verdict.problems and not [line for line in verdict.warnings if "other bytes" in line], verdict


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_tool_may_cut_large_values_off(method: str, tmp_path: Path) -> None:
    weights = tiny.tensors(dtype="float32")
    weights[WEIGHT] = (np.random.default_rng(0).standard_t(4, weights[WEIGHT].shape) / 50).astype(np.float32)
    source = tiny.write(tmp_path / "in", weights, tiny.config(torch_dtype="float32"))
    api.convert(source, tmp_path / "out", HuggingFace(quant="w4a16", method=method, group_size=128, arithmetic="llm-compressor-cpu"))
    (tmp_path / "out" / manifest.NAME).unlink()
    assert not verify(tmp_path / "out", source).problems


@pytest.mark.parametrize("what", ["reversed", "half as large again", "zero"])
def test_another_tool_may_not_write_other_values(tmp_path: Path, what: str) -> None:
    name, change = SPOILT[what]
    damaged(tmp_path, change, name, **INT8)
    (tmp_path / "out" / manifest.NAME).unlink()
    assert verify(tmp_path / "out", tmp_path / "in").problems


def test_the_same_values_in_other_files_and_folders(tmp_path: Path) -> None:
    """The bytes decide: a source that moved, in two shards, or pickled."""
    weights = tiny.tensors()
    api.convert(tiny.write(tmp_path / "in", weights), tmp_path / "out", TensorRTLLM(**INT8))
    (tmp_path / "in").rename(tmp_path / "moved")
    assert verify(tmp_path / "out", tmp_path / "moved").warnings == []
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({name: torch.from_numpy(held) for name, held in weights.items()}, pickled / "pytorch_model.bin")
    (pickled / "config.json").write_text((tmp_path / "moved" / "config.json").read_text())
    verdict = verify(tmp_path / "out", pickled)
    assert not verdict.problems and "their bytes decide" in verdict.warnings[0]


def test_ranges_that_moved(tmp_path: Path) -> None:
    weights, asked = tiny.tensors(), tmp_path / "ranges.safetensors"
    random = np.random.default_rng(2)
    found = {}
    for name, held in weights.items():
        if "_proj" in name:
            for end, axis in ((".x", 1), (".y", 0)):
                found[name.removesuffix(".weight") + end] = random.uniform(1, 2, held.shape[axis]).astype(np.float32)
    save_file({name: torch.from_numpy(held) for name, held in found.items()}, asked)
    source = tiny.write(tmp_path / "in", weights)
    (tmp_path / "runs").mkdir()
    out = tmp_path / "runs" / "out"
    api.convert(source, out, TensorRTLLM(quant="smoothquant", activation_ranges=str(asked)))
    assert not verify(out, source).problems
    asked = asked.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UsageError, match="are not there"):
        verify(out, source)
    assert not verify(out, source, activation_ranges=str(asked)).problems
    asked.rename(tmp_path / "runs" / "ranges.safetensors")  # beside the output it is found
    assert not verify(out, source).problems


def test_flags_without_a_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Resources are noted, and the folder is looked at: there is nothing in it."""
    assert main(["verify", str(tmp_path), "--memory-budget", "1GiB", "--workers", "2"]) == 7
    told = capfd.readouterr().err
    assert "note: --memory-budget has no effect without --source" in told and "note: --workers has no effect without --source" in told


def test_a_small_budget_compares_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "in", {})
    api.convert(source, tmp_path / "out", TensorRTLLM(**INT8))
    monkeypatch.setattr(measured, "smallest", lambda plan: 1 << 40)
    verdict = verify(tmp_path / "out", source)
    assert not verdict.problems and verdict.encoded and not verdict.errors and "error and SNR are not shown" in verdict.warnings[0]


def test_without_a_manifest_values_are_not_checked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in", {})
    api.convert(source, tmp_path / "out", TensorRTLLM(tp_size=2))
    (tmp_path / "out" / manifest.NAME).unlink()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "structure good, values not checked" in capfd.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["values_checked"] is False


def test_a_changed_byte_of_padding_counts_once(tmp_path: Path) -> None:
    """Rows that no source fills, in an output without a manifest."""
    source = write_model(tmp_path / "in", vocab=63, hidden=128)
    api.convert(source, tmp_path / "out", TensorRTLLM(tp_size=2))
    file = tmp_path / "out" / "rank1.safetensors"
    weights = load_file(file)
    assert not weights["lm_head.weight"][-1].any()
    weights["lm_head.weight"].view(torch.uint8)[-1, -1] = 1
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "out" / manifest.NAME).unlink()
    (problem,) = verify(tmp_path / "out", source).problems
    assert "lm_head.weight: 1 of 8192 bytes" in problem
