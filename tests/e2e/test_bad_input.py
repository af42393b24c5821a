"""A user's mistake is one line, a documented exit status, and nothing left behind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamconv.cli.main import main
from tests import tiny

Break = Callable[[Path], None]


def _config(**changes: object) -> Break:
    def apply(model: Path) -> None:
        (model / "config.json").write_text(json.dumps(tiny.config(**changes)))

    return apply


def _weights(change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    def apply(model: Path) -> None:
        weights = tiny.tensors()
        change(weights)
        tiny.write(model, weights)

    return apply


def _truncate(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def _index_outside(model: Path) -> None:
    names = {name: "../elsewhere.safetensors" for name in tiny.tensors()}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _rename(weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.1.mlp.up_projj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")


def _wrong_shape(weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((255, 128), np.float16)


def _four_bits(model: Path) -> None:
    weights = tiny.tensors() | {"model.layers.0.mlp.up_proj.weight": np.zeros((16384, 1), np.uint8)}
    tiny.write(model, weights, tiny.config(quantization_config={"quant_method": "bitsandbytes"}))


def _nan(weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan


CASES: dict[str, tuple[Break, list[str], int, str]] = {
    "no config.json": (lambda m: (m / "config.json").unlink(), [], 3, "config.json"),
    "config.json is no JSON": (lambda m: (m / "config.json").write_text("{"), [], 3, "config.json"),
    "unknown architecture": (_config(architectures=["NopeForCausalLM"]), [], 3, "NopeForCausalLM"),
    "no architecture": (_config(architectures=[]), [], 3, "architectures"),
    "missing tensor": (_weights(lambda w: w.pop("model.norm.weight")), [], 3, "missing tensor model.norm.weight"),
    "misnamed tensor": (_weights(_rename), [], 3, "nearest name: model.layers.1.mlp.up_projj.weight"),
    "extra tensor": (_weights(lambda w: w.update(extra=np.zeros(4, np.float16))), [], 3, "unexpected tensor extra"),
    "wrong shape": (_weights(_wrong_shape), [], 3, "shape [255, 128]"),
    "truncated shard": (_truncate, [], 3, "model.safetensors"),
    "garbage header": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), [], 3, "model.safetensors"),
    "header length lies": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
        [],
        3,
        "model.safetensors",
    ),
    "index points outside": (_index_outside, [], 3, "elsewhere.safetensors"),
    "already quantized": (_four_bits, [], 4, "already quantized"),
    "tp does not divide": (lambda m: None, ["--tp-size", "3"], 4, "--tp-size 3 does not divide"),
    "tp is no number": (lambda m: None, ["--tp-size", "x"], 2, "--tp-size"),
    "unknown flag": (lambda m: None, ["--tp-sizes", "2"], 2, "--tp-sizes"),
    "unknown quant": (lambda m: None, ["--quant", "int3"], 2, "int3"),
    "no target": (lambda m: None, ["--quant", "int8"], 2, "--target-sm is required"),
    "unknown sm": (lambda m: None, ["--quant", "int8", "--target-sm", "81"], 2, "81"),
    "no size": (lambda m: None, ["--memory-budget", "lots"], 2, "lots"),
    "budget too small": (lambda m: None, ["--memory-budget", "8MiB"], 5, "the smallest budget that works"),
    "nan": (_weights(_nan), ["--quant", "int8", "--target-sm", "80"], 8, "model.layers.1.mlp.down_proj.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, flags, status, says = CASES[case]
    model = tiny.write(tmp_path / "model")
    spoil(model)
    assert main(["convert", str(model), str(tmp_path / "out"), *flags]) == status
    shown = capfd.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_all_refusals_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.write(tmp_path / "model", settings=tiny.config(intermediate_size=250, vocab_size=160))
    assert main(["convert", str(model), str(tmp_path / "out"), "--tp-size", "3", "--pp-size", "9"]) == 4
    shown = capfd.readouterr().err
    for part in ("num_attention_heads", "intermediate_size", "--pp-size 9"):
        assert part in shown


def test_missing_source(tmp_path: Path) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 3


def test_existing_output_is_kept(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert main(["convert", str(model), str(out)]) == 6
    assert main(["convert", str(model), str(out), "--force", "--quiet"]) == 6  # it replaces checkpoints, and nothing else
    assert (out / "precious").read_text() == "x"
    (out / "precious").rename(out / "config.json")
    assert main(["convert", str(model), str(out)]) == 6
    assert main(["convert", str(model), str(out), "--force", "--quiet"]) == 0
    assert (out / "rank0.safetensors").exists()


@pytest.mark.parametrize("name", ["model", "model/../model", "."])
def test_the_source_as_output_is_refused_always(name: str, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    before = sorted(path.name for path in model.iterdir())
    assert main(["convert", str(model), str(tmp_path / name), "--force"]) == 6
    assert sorted(path.name for path in model.iterdir()) == before


def test_overflow_is_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tiny.tensors(dtype="float32")
    weights["model.norm.weight"][:3] = 1e6
    model = tiny.write(tmp_path / "model", weights)
    assert main(["convert", str(model), str(tmp_path / "out")]) == 0
    assert "model.norm.weight: 3 values are too large for float16" in capfd.readouterr().err
