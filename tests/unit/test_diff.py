"""`streamconv diff`: held against numpy on the arrays that the two checkpoints were written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import streamconv
from streamconv import memory
from streamconv.cli.main import main
from streamconv.errors import BudgetError
from streamconv.verification.difference import TensorDifference, compare
from tests import tiny

UP = "model.layers.1.mlp.up_proj.weight"


def _changed(**changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: changes.get(name, value) for name, value in tiny.tensors().items()}


def _of(made: streamconv.Comparison, name: str) -> TensorDifference:
    return next(tensor for tensor in made.tensors if tensor.name == name)


def test_errors_are_those_of_numpy(tmp_path: Path) -> None:
    first = tiny.tensors()
    other = first[UP].copy()
    other[3:9, ::7] += np.float16(0.01)
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", _changed(**{UP: other}))
    found = _of(streamconv.diff(a, b), UP)
    want, got = first[UP].astype(np.float64), other.astype(np.float64)
    gap = np.abs(got - want)
    assert (found.state, found.differing, found.largest) == ("differs", np.count_nonzero(gap), gap.max())
    assert found.relative == gap.max() / np.abs(want).max()
    assert found.snr_db == pytest.approx(10 * np.log10((want**2).sum() / (gap**2).sum()), abs=1e-9)


def test_states_and_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tiny.write(tmp_path / "a")
    weights = _changed(**{"lm_head.weight": tiny.tensors()["lm_head.weight"].astype(np.float32)})
    same_values = tiny.write(tmp_path / "dtype", weights)
    assert main(["diff", str(a), str(a)]) == 0
    assert main(["diff", str(a), str(same_values)]) == 7
    assert main(["diff", str(a), str(same_values), "--tolerance", "0"]) == 0
    weights["model.norm.weight"] = weights["model.norm.weight"][:64]
    weights["more"] = weights.pop(UP)
    b = tiny.write(tmp_path / "b", weights)
    capsys.readouterr()
    assert main(["diff", str(a), str(b), "--tolerance", "1e9", "--json"]) == 7
    told = json.loads(capsys.readouterr().out)
    states = {tensor["name"]: tensor["state"] for tensor in told["tensors"] if tensor["state"] != "exact"}
    assert states == {"more": "only in B", UP: "only in A", "model.norm.weight": "shape", "lm_head.weight": "dtype"}
    assert (told["within"], told["only_a"], told["only_b"], told["shape"], told["dtype"]) == (False, 1, 1, 1, 1)
    assert main(["diff", str(a), str(b)]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [UP, "more", "model.norm.weight", "lm_head.weight"]
    assert main(["diff", str(a), str(b), "--all"]) == 7
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert len(names) == len(tiny.tensors()) + 1 and names[0] == "lm_head.weight"
    assert main(["diff", str(a), str(b), "--tolerance", "-1"]) == 2
    assert main(["diff", str(a), str(tmp_path / "nothing")]) == 3


@pytest.mark.parametrize(("change", "differing", "odd"), [(np.nan, 1, 1), (np.inf, 1, 1), (-0.0, 0, 0)])
def test_values_that_numbers_do_not_tell_apart(tmp_path: Path, change: float, differing: int, odd: int) -> None:
    first, other = tiny.tensors()[UP], tiny.tensors()[UP]
    first[0, 0], other[0, 0] = 0.0, change
    a, b = tiny.write(tmp_path / "a", _changed(**{UP: first})), tiny.write(tmp_path / "b", _changed(**{UP: other}))
    made = compare(str(a), str(b))
    found = _of(made, UP)
    assert (found.state, found.differing, found.odd) == ("differs", differing, odd)
    assert not made.within() and made.within(0.0) == (odd == 0)
    assert compare(str(b), str(b)).within()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool])
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    first = torch.linspace(-3, 3, 200).to(dtype).reshape(20, 10)
    other = first.clone()
    other[7, 1] = 1
    other[2, 3] = 0
    save_file({"x": first}, tmp_path / "a.safetensors")
    save_file({"x": other}, tmp_path / "b.safetensors")
    (found,) = compare(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")).tensors
    gap = (first.double() - other.double()).abs()
    assert (found.differing, found.largest) == (int(gap.count_nonzero()), float(gap.max()))


@pytest.mark.parametrize("quant", ["fp8_dynamic", "fp8_block", "w4a16"])
def test_a_quantized_model_is_compared_by_its_values(tmp_path: Path, quant: str) -> None:
    a = tiny.write(tmp_path / "a")
    streamconv.convert(a, tmp_path / "b", streamconv.HuggingFace(quant=quant))
    streamconv.convert(tmp_path / "b", tmp_path / "decoded", streamconv.HuggingFace(quant="none", dtype="float32"))
    made = compare(str(a), str(tmp_path / "b"))
    decoded = compare(str(a), str(tmp_path / "decoded"))
    assert made.beside > 0 and not made.warnings
    assert [(t.name, t.largest, t.snr_db) for t in made.tensors] == [(t.name, t.largest, t.snr_db) for t in decoded.tensors]
    assert _of(made, UP).snr_db > 15 and not made.within() and made.within(0.1)
    assert compare(str(tmp_path / "b"), str(tmp_path / "b")).within()


def test_scales_of_two_forms_are_not_compared(tmp_path: Path) -> None:
    a = tiny.write(tmp_path / "a")
    for quant in ("fp8_dynamic", "w4a16"):
        streamconv.convert(a, tmp_path / quant, streamconv.HuggingFace(quant=quant))
    made = compare(str(tmp_path / "fp8_dynamic"), str(tmp_path / "w4a16"))
    assert {t.name for t in made.tensors} == set(tiny.tensors()) and made.beside > 0 and _of(made, UP).snr_db > 15


def test_scales_count_between_models_of_one_form(tmp_path: Path) -> None:
    """An input scale has no part in the decoded weight; a change of it is still one."""
    a = tiny.write(tmp_path / "a")
    streamconv.convert(a, tmp_path / "b", streamconv.HuggingFace(quant="fp8_dynamic"))
    tensors = {name: tensor.torch() for name, tensor in streamconv.open(tmp_path / "b").items()}
    for name, value in (("c", 0.5), ("d", 0.25)):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors | {UP.replace("weight", "input_scale"): torch.tensor([value])}, folder / "model.safetensors")
        (folder / "config.json").write_bytes((tmp_path / "b/config.json").read_bytes())
    for first, state, largest in (("c", "differs", 0.25), ("b", "only in B", 0.0)):
        made = compare(str(tmp_path / first), str(tmp_path / "d"))
        (found,) = [tensor for tensor in made.tensors if tensor.state != "exact"]
        assert (found.name, found.state, found.largest) == (UP.replace("weight", "input_scale"), state, largest)


def test_ranks_of_two_checkpoints(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", _changed(**{UP: tiny.tensors()[UP] * np.float16(2)}))
    for folder in (a, b):
        streamconv.convert(folder, f"{folder}_tp2", streamconv.TensorRTLLM(tp_size=2))
    made = compare(f"{a}_tp2", f"{b}_tp2")
    assert [t.name for t in made.tensors if t.state != "exact"] == [f"rank{rank}.transformer.layers.1.mlp.gate.weight" for rank in (0, 1)]


def test_wrapped_names_are_the_same_names(tmp_path: Path) -> None:
    a = tiny.write(tmp_path / "a")
    b = tiny.write(tmp_path / "b", {f"_orig_mod.{name}": value for name, value in tiny.tensors().items()})
    assert compare(str(a), str(b)).within()


def test_the_budget_is_kept_or_refused(tmp_path: Path) -> None:
    a = tiny.write(tmp_path / "a")
    for budget in (1 << 20, memory.resident() + (1 << 20)):
        with pytest.raises(BudgetError, match="cannot work") as refused:
            compare(str(a), str(a), budget)
        assert refused.value.hint is not None
        enough = int(refused.value.hint.split()[3].removesuffix("MiB")) << 20
        assert compare(str(a), str(a), enough).within()
