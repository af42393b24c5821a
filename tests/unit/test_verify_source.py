"""`verify --source`: what the format does to hard values is no fault, and what was changed afterwards is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from streamconv import api, manifest
from streamconv.cli.main import main
from streamconv.options import Options
from streamconv.verify import Verdict, verify
from tests import tiny

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
    api.convert(source, tmp_path / "out", Options(**options))
    return verify(tmp_path / "out", source)


def test_a_value_that_overflows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verdict = seen(tmp_path, {(WEIGHT, 3, 5): 1e6}, dtype="float16")
    assert not verdict.problems
    assert [line for line in verdict.warnings if "1 values of the source or the output are not finite" in line]
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
    api.convert(source, out, Options(**options))
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
    index, plan = api.open_and_plan(source, told.options)
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


def test_without_a_manifest_values_are_not_checked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in", {})
    api.convert(source, tmp_path / "out", Options(tp_size=2))
    (tmp_path / "out" / manifest.NAME).unlink()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "structure good, values not checked" in capfd.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["values_checked"] is False
