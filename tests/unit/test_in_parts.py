"""Conversions in parts have the bytes of conversions in one go: every quant, both targets, reductions and ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamconv import api
from streamconv.cli.main import main
from streamconv.errors import OutputError, VerifyError
from streamconv.families import all_families
from streamconv.options import Resources
from streamconv.progress import Meter, Progress
from streamconv.publishing import finish
from streamconv.run.fs import hidden
from streamconv.targets.base import Target
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.conformance.recipes import RECIPES, Recipe
from tests.conformance.sources import RUNS, make
from tests.unit import test_hf_ranges

FAMILIES = {family.name: family for family in all_families()}
LLAMA, MIXTRAL = (next(recipe for recipe in RECIPES if str(recipe) == name) for name in ("llama", "mixtral"))
QUICK = ("int8", "smoothquant", "int4_gptq", "fp8_rowwise")
CASES = [pytest.param(LLAMA, quant, id=f"llama-{quant}", marks=() if quant in QUICK else pytest.mark.slow) for quant in RUNS]
CASES.append(pytest.param(MIXTRAL, "int8", id="mixtral-int8"))


def _resources(**more: Any) -> Resources:
    return Resources(memory_budget=4 << 30, workers=2, device="cpu", tile_rows=64, **more)


def _same(folder: Path, other: Path) -> None:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*"))
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def _in_parts_and_alone(model: Path, options: Target, place: Path) -> None:
    api.convert(model, place / "alone", options, _resources())
    for part in (3, 0):
        assert not api.convert(model, place / "parts", options, _resources(parts=4, part=part)).published
    assert api.convert(model, place / "parts", options, _resources(parts=4)).published
    _same(place / "alone", place / "parts")


@pytest.mark.parametrize(("recipe", "quant"), CASES)
def test_rank_files(recipe: Recipe, quant: str, tmp_path: Path) -> None:
    run = RUNS[quant][0]
    source = make(recipe, FAMILIES[recipe.family], run, tmp_path / "in")
    _in_parts_and_alone(source.folder, source.options(quant, run, tp_size=2), tmp_path)


@pytest.mark.parametrize("quant", ["none", "fp8_dynamic", "mxfp4"])
def test_a_hugging_face_directory(quant: str, tmp_path: Path) -> None:
    _in_parts_and_alone(tiny.write(tmp_path / "in"), HuggingFace(quant=quant), tmp_path)


def test_inline_verification(tmp_path: Path) -> None:
    """Each worker measures the matrices of its parts; the manifest has those of all of them."""
    model, options = tiny.write(tmp_path / "in"), HuggingFace(quant="w4a16", group_size=32)
    checked = _resources(verify_inline=True)
    alone = api.convert(model, tmp_path / "alone", options, checked).outputs[0].errors
    found = list(api.convert(model, tmp_path / "parts", options, replace(checked, parts=3, part=1)).outputs[0].errors)
    assert 0 < len(found) < len(alone)
    found += api.convert(model, tmp_path / "parts", options, replace(checked, parts=3)).outputs[0].errors
    assert {error.name: error for error in found} == {error.name: error for error in alone} and len(found) == len(alone)
    _same(tmp_path / "alone", tmp_path / "parts")
    assert len(json.loads((tmp_path / "parts" / "streamconv.json").read_text())["snr"]) == 1
    with pytest.raises(VerifyError, match="--min-snr 60"):
        api.convert(model, tmp_path / "low", options, replace(checked, parts=3, min_snr=60.0))
    assert not (tmp_path / "low").exists()


def test_partners_share_a_reduction(tmp_path: Path) -> None:
    """NVFP4: q, k and v, gate and up share their scale, which is a maximum over all of them."""
    weights = tiny.tensors(dtype="float32")
    model, ranges = test_hf_ranges.setting(tmp_path, weights, test_hf_ranges.ranges_of(weights))
    _in_parts_and_alone(model, HuggingFace(quant="nvfp4", activation_ranges=ranges), tmp_path)


def test_read_back_before_it_is_published(tmp_path: Path) -> None:
    """Another machine has written over a page, which locks should have prevented."""
    model, out = tiny.write(tmp_path / "in"), tmp_path / "out"
    for part in range(2):
        api.convert(model, out, HuggingFace(quant="none"), _resources(parts=2, part=part, no_lock=True))
    written = hidden(out, "partial") / "model.safetensors"
    right = written.read_bytes()
    with open(written, "r+b") as file:
        file.seek(3 * 4096)
        file.write(bytes(100))
    with pytest.raises(VerifyError, match="is not what was written"):
        finish(out, check=True)
    assert not out.exists()
    with open(written, "r+b") as file:
        file.write(right)
    finish(out, check=True)
    api.convert(model, tmp_path / "alone", HuggingFace(quant="none"), _resources())
    _same(tmp_path / "alone", out)


def test_status_and_finalize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny.write(tmp_path / "in")), str(tmp_path / "out")
    assert main(["status", out, "--json"]) == 6
    assert main(["finalize", out]) == 6
    assert main(["convert", model, out, "--part", "1/3", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["status", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["parts"], told["done"], told["open"], told["held"]) == (3, 1, 2, [])
    assert main(["finalize", out]) == 6
    assert "of 3 parts 0, 2 are not done" in capsys.readouterr().err
    assert main(["convert", model, out, "--parts", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["published"] and told["parts"] == [0, 2]
    assert main(["finalize", out]) == 0 == main(["status", out])
    for part in range(3):
        assert main(["verify", out, "--source", model, "--part", f"{part}/3", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    tensors = len(tiny.tensors()) - 4  # q, k and v become one
    assert sum(each["hashed"] for each in told) == sum(each["encoded"] for each in told) == tensors


def test_a_part_of_an_output_that_somebody_replaced(tmp_path: Path) -> None:
    """A finished output of something else is in the way of the last worker, not of the first."""
    model, out = tiny.write(tmp_path / "in"), tmp_path / "out"
    api.convert(model, out, HuggingFace(quant="none"), _resources(parts=2, part=0))
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        api.convert(model, out, HuggingFace(quant="none"), _resources(parts=2))
    (out / "notes.txt").unlink()
    assert api.convert(model, out, HuggingFace(quant="none"), _resources(parts=2)).published


def test_several_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that is stopped, another that takes its place, one that comes when all is done; each output is that of a run alone."""
    model, names = tiny.write(tmp_path / "in"), ("a", "b")
    targets: tuple[Target, ...] = (TensorRTLLM(tp_size=2, quant="int8", target_sm=80), HuggingFace(quant="fp8_dynamic"))
    for name, target in zip(names, targets, strict=True):
        api.convert(model, tmp_path / f"{name} alone", target, _resources())
    asked = [target.to(tmp_path / name) for name, target in zip(names, targets, strict=True)]

    def late(now: Progress) -> None:
        if now.outputs[1].done > now.outputs[1].total / 2:
            assert now.outputs[0].done == now.outputs[0].total and now.done > now.total / 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert_all(model, asked, _resources(parts=4), meter=Meter(late, every=0))
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert main(["status", str(tmp_path / "b")]) == 0 and "of 4 parts are done" in capsys.readouterr().out
    words = [str(model), f"--output=trtllm:{tmp_path / 'a'}:tp_size=2,quant=int8,target_sm=80"]
    words += [f"--output=hf:{tmp_path / 'b'}:quant=fp8_dynamic"]
    more = ["--memory-budget", "4GiB", "--device", "cpu", "--workers", "2"]
    assert main(["convert", *words, *more, "--parts", "4"]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'a'}: no part done here; complete" in told and "all outputs are complete" in told
    for name in names:
        _same(tmp_path / f"{name} alone", tmp_path / name)
    seen: list[Progress] = []
    again = api.convert_all(model, asked, _resources(parts=4), meter=Meter(seen.append))
    assert [(one.done, one.finished) for one in seen[-1].outputs] == [(one.total, True) for one in seen[-1].outputs]
    assert again.published and again.bytes_read == 0 and [one.finished for one in again.outputs] == [True, True]


def test_parts_of_several_outputs_by_number(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "in")
    asked = [TensorRTLLM().to(tmp_path / "a"), HuggingFace(quant="mxfp4").to(tmp_path / "b")]
    for part in (1, 0):
        report = api.convert_all(model, asked, _resources(parts=2, part=part, no_lock=True))
        assert [(one.parts, one.published) for one in report.outputs] == [((part,), False)] * 2
    for name in "ab":
        assert main(["finalize", str(tmp_path / name), "--no-lock", "--verify"]) == 0
        assert main(["verify", str(tmp_path / name), "--source", str(model), "--quiet"]) == 0
