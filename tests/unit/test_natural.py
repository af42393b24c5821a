"""Lists of tensors in the order of the layers, and no longer than a person reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest

from streamconv.cli import verify
from streamconv.cli.main import main
from streamconv.natural import natural
from streamconv.verification.verdict import TensorError, Verdict
from tests import tiny


def test_numbers_count_as_numbers() -> None:
    names = [f"model.layers.{layer}.experts.{expert}.w{n}" for layer in (0, 2, 9, 10, 11, 100) for expert in (1, 2, 30) for n in (1, 3)]
    mixed = names.copy()
    Random(1).shuffle(mixed)
    assert sorted(mixed, key=natural) == names
    odd = ["a", "a.b", "a2", "a10", "a" + "9" * 79, "a" + "1" * 80]
    assert sorted(reversed(odd), key=natural) == odd


def _errors() -> list[TensorError]:
    shown = {f"transformer.layers.{n}.w": float(60 - n) for n in range(11, -1, -1)} | {"lm_head": math.inf}
    return [TensorError("rank0.safetensors", name, 4, 1.0 / snr, 0.5 / snr, snr) for name, snr in shown.items()]


def _rows(told: str) -> list[str]:
    return [line.split()[1] for line in told.splitlines() if line.startswith("rank0")]


def test_verify_shows_the_worst_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    verify.show("out", Verdict(encoded=13, errors=_errors()), quiet=False)
    told = capsys.readouterr().out
    assert _rows(told) == [f"transformer.layers.{n}.w" for n in range(11, 1, -1)]
    assert "13 matrices, 1 exact: max error 0.0204, relative 0.0102, SNR at least 49.0 dB; the worst 10 are shown" in told


def test_all_of_them_in_the_order_of_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    verify.show("out", Verdict(encoded=13, errors=_errors()), quiet=False, every=True)
    told = capsys.readouterr().out
    assert _rows(told) == ["lm_head", *(f"transformer.layers.{n}.w" for n in range(12))]
    assert "are shown" not in told


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny.write(tmp_path / "model")), str(tmp_path / "out")
    assert main(["convert", model, out, "--quant", "int8", "--target-sm", "80", "-q"]) == 0
    assert main(["verify", out, "--source", model]) == 0
    few = capsys.readouterr().out
    assert main(["verify", out, "--source", model, "--all"]) == 0
    every = capsys.readouterr().out
    assert len(_rows(few)) == verify.WORST < len(_rows(every)) and set(_rows(few)) < set(_rows(every))
    assert main(["verify", out, "--all"]) == 0
    assert "note: --all has no effect without --source" in capsys.readouterr().err


def test_inspect_and_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {f"extra.{n}.weight": np.ones((2, 2), np.float32) for n in (10, 9, 1, 2)}
    model = str(tiny.write(tmp_path / "model", tiny.tensors() | odd))
    wanted = [f"extra.{n}.weight" for n in (1, 2, 9, 10)]
    assert main(["inspect", model, "--json"]) == 0
    names = [tensor["name"] for tensor in json.loads(capsys.readouterr().out)["tensors"]]
    assert [name for name in names if name.startswith("extra")] == wanted
    assert main(["plan", model]) == 3
    told = capsys.readouterr().err
    assert [told.index(f"tensor {name}") for name in wanted] == sorted(told.index(f"tensor {name}") for name in wanted)
