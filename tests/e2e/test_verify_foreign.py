"""`verify` on a checkpoint without our manifest: config.json alone says what must be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.cli.main import main
from tests import tiny

FLAGS: dict[str, list[str]] = {
    "plain": ["--tp-size", "2", "--pp-size", "2"],
    "int8": ["--quant", "int8", "--target-sm", "80", "--tp-size", "2"],
    "raw": ["--quant", "int4", "--encoding", "raw"],
    "fp8_rowwise": ["--quant", "fp8_rowwise", "--kv-cache", "fp8"],
    "old": ["--target-version", "0.16", "--rope-tables", "--use-parallel-embedding", "--tp-size", "2"],
}


def _foreign(folder: Path, flags: list[str]) -> Path:
    """A conversion that another tool might have made."""
    out = folder / "out"
    assert main(["convert", str(tiny.write(folder / "model")), str(out), *flags, "-q"]) == 0
    (out / "streamconv.json").unlink()
    return out


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_good_one_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    out = _foreign(tmp_path, flags)
    assert main(["verify", str(out)]) == 0
    told = capsys.readouterr()
    assert "another tool wrote this" in told.err and "good" in told.out


FC = "transformer.layers.0.mlp.fc.weight"
Spoil = Callable[[dict[str, torch.Tensor]], Any]
SPOILS: dict[str, tuple[Spoil, str]] = {
    "dropped": (lambda t: t.pop(FC), f"{FC} is missing"),
    "renamed": (lambda t: t.update({"transformer.layers.0.mlp.fcc.weight": t.pop(FC)}), "mlp.fcc.weight is unexpected"),
    "cut": (lambda t: t.update({FC: t[FC][:-1].contiguous()}), f"{FC}: shape [127, 128], config.json means [128, 128]"),
    "retyped": (lambda t: t.update({FC: t[FC].float()}), f"{FC}: dtype F32, config.json means F16"),
    "a norm kept in float32": (
        lambda t: t.update({"transformer.layers.0.post_layernorm.weight": t["transformer.layers.0.post_layernorm.weight"].float()}),
        "post_layernorm.weight: dtype F32",
    ),
    "surplus": (lambda t: t.update({"transformer.layers.9.mlp.fc.weight": t[FC].clone()}), "layers.9.mlp.fc.weight is unexpected"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILS.values(), ids=SPOILS)
def test_a_bad_one_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, words: str) -> None:
    out = _foreign(tmp_path, FLAGS["plain"])
    for name in ("rank0.safetensors", "rank1.safetensors"):
        tensors = load_file(out / name)
        spoil(tensors)
        save_file(tensors, out / name)
    assert main(["verify", str(out)]) == 7
    told = capsys.readouterr().err
    assert words in told and "rank0.safetensors" in told and "rank1.safetensors" in told


def test_quantized_bytes_under_the_wrong_type_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int8 weights without their scales, and uint8 in place of int8 (which the loader would quantize once more)."""
    out = _foreign(tmp_path, FLAGS["int8"])
    tensors = load_file(out / "rank0.safetensors")
    del tensors["transformer.layers.0.mlp.fc.per_channel_scale"]
    tensors[FC] = tensors[FC].view(torch.uint8)
    save_file(tensors, out / "rank0.safetensors")
    assert main(["verify", str(out)]) == 7
    told = capsys.readouterr().err
    assert "mlp.fc.per_channel_scale is missing" in told and f"{FC}: dtype U8" in told
