"""Several outputs from one read: the bytes of single runs, each byte of the source read once, finished ones skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamconv
from streamconv import api
from streamconv.errors import OutputError, RefusedError, StreamconvError, UsageError
from streamconv.families import all_families
from streamconv.options import Resources
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, Progress
from streamconv.targets.base import Output, Target
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.conformance.recipes import RECIPES
from tests.conformance.sources import RUNS, make

TARGETS: dict[str, Target] = {
    "int8 tp2": TensorRTLLM(quant="int8", target_sm=90, tp_size=2),
    "int4": TensorRTLLM(quant="int4", target_sm=80),
    "plain tp4": TensorRTLLM(tp_size=4),
    "fp8 block": HuggingFace(quant="fp8_block"),  # 128 rows belong together, wherever the others cut
    "fp8": HuggingFace(quant="fp8_dynamic"),
    "w4a16": HuggingFace(quant="w4a16", ignore=("*.down_proj",)),
}
PASSES: dict[str, Target] = {  # the largest value of a matrix first, then the matrix
    "nvfp4": HuggingFace(quant="nvfp4a16"),
    "modelopt": HuggingFace(quant="nvfp4a16", format="modelopt"),
    "fp8": HuggingFace(quant="fp8_dynamic"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("outputs") / "model")


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("single") / name for name in (*TARGETS, *(f"passes {name}" for name in PASSES))}
    for name, folder in folders.items():
        api.convert(model, folder, TARGETS[name] if name in TARGETS else PASSES[name.removeprefix("passes ")])
    return folders


def outputs(place: Path, targets: dict[str, Target] = TARGETS) -> list[Output]:
    return [target.to(place / name) for name, target in targets.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def late(share: float = 0.5) -> Callable[[Progress], None]:
    """Interrupts a run that is so far."""

    def watch(now: Progress) -> None:
        if now.done > now.total * share:
            raise KeyboardInterrupt

    return watch


def weights(model: Path) -> int:
    return sum(array.nbytes for path in model.glob("*.safetensors") for array in load_file(path).values())


@pytest.mark.parametrize(("rows", "workers"), [(None, None), (16, 3)])
def test_bytes_of_single_runs_from_one_read(
    rows: int | None, workers: int | None, model: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    report = api.convert_all(model, outputs(tmp_path), Resources(tile_rows=rows, workers=workers))
    assert report.bytes_read == weights(model)
    for name in TARGETS:
        assert files(tmp_path / name) == files(single[name]), name
    assert [written.out for written in report.outputs] == [str(tmp_path / name) for name in TARGETS]
    assert sum(written.bytes_written for written in report.outputs) == report.bytes_written


def test_a_second_pass_is_shared(model: Path, single: dict[str, Path], tmp_path: Path) -> None:
    alone = api.convert_all(model, outputs(tmp_path / "alone", {"nvfp4": PASSES["nvfp4"]})).bytes_read
    assert weights(model) < alone <= 2 * weights(model)
    report = api.convert_all(model, outputs(tmp_path, PASSES), Resources(tile_rows=16, workers=3))
    assert report.bytes_read == alone
    for name in PASSES:
        assert files(tmp_path / name) == files(single[f"passes {name}"]), name


def test_names_behind_a_prefix_are_the_same_rows(model: Path, tmp_path: Path) -> None:
    """One target takes the prefix off, the other keeps it; a tied embedding is stored once."""
    folder = tmp_path / "wrapped"
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        save_file({f"module.{name}": array for name, array in load_file(path).items()}, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    report = api.convert_all(folder, [TARGETS["int8 tp2"].to(tmp_path / "a"), HuggingFace().to(tmp_path / "b")])
    assert report.bytes_read == weights(folder)
    api.convert(folder, tmp_path / "c", TARGETS["int8 tp2"])
    assert files(tmp_path / "a") == files(tmp_path / "c")


@pytest.mark.parametrize(("family", "at"), [("phi3", 0), ("internlm2", 0), ("mixtral", 1)])
def test_rows_wanted_in_two_orders(family: str, at: int, tmp_path: Path) -> None:
    """gate_up_proj is stored the other way round, wqkv head by head, experts as one tensor: still one read, also of a resumed run."""
    recipe = [recipe for recipe in RECIPES if recipe.family == family][at]
    known = next(each for each in all_families() if each.name == family)
    source = make(recipe, known, RUNS["none"][0], tmp_path / "in")
    targets: dict[str, Target] = {"a": source.options("int8", RUNS["int8"][0]), "b": HuggingFace(), "c": HuggingFace(quant="fp8_block")}
    loose = Reads([api.open_and_plan(source.folder, target)[1] for target in targets.values()]).loose
    assert any(loose)
    with pytest.raises(KeyboardInterrupt):
        few = Resources(tile_rows=16, workers=1)
        api.convert_all(source.folder, outputs(tmp_path, targets), few, meter=Meter(late(0.9), every=0))
    again = api.convert_all(source.folder, outputs(tmp_path, targets), Resources(tile_rows=40, workers=3))
    assert all(written.resumed for written in again.outputs)
    report = api.convert_all(source.folder, outputs(tmp_path, targets), Resources(tile_rows=24, workers=3), force=True)
    single = {name: api.convert(source.folder, tmp_path / f"{name} alone", target) for name, target in targets.items()}
    assert report.bytes_read == max(alone.bytes_read for alone in single.values())
    for name in targets:
        assert files(tmp_path / name) == files(tmp_path / f"{name} alone"), name


def test_a_finished_output_is_skipped(model: Path, single: dict[str, Path], tmp_path: Path) -> None:
    three = {name: TARGETS[name] for name in ("int4", "fp8", "plain tp4")}
    api.convert(model, tmp_path / "fp8", TARGETS["fp8"])
    report = api.convert_all(model, outputs(tmp_path, three))
    assert [written.finished for written in report.outputs] == [False, True, False]
    assert report.bytes_written == sum(written.bytes_written for written in report.outputs if not written.finished)
    for name in three:
        assert files(tmp_path / name) == files(single[name]), name
    again = api.convert_all(model, outputs(tmp_path, three))
    assert again.bytes_read == 0 and all(written.finished for written in again.outputs)
    copied = shutil.copytree(model, tmp_path / "copied")  # newer files of the same values
    assert api.convert_all(copied, outputs(tmp_path, three)).bytes_read == 0
    assert api.convert_all(model, outputs(tmp_path, three), force=True).bytes_read == weights(model)


@pytest.mark.parametrize("change", ["options", "source", "size"])
def test_another_output_is_in_the_way(change: str, model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    api.convert(source, tmp_path / "fp8", TARGETS["fp8"])
    target = TARGETS["fp8"] if change != "options" else HuggingFace(quant="fp8_dynamic", ignore=("*.down_proj",))
    if change == "source":  # a fine-tune: other values under the same names
        weight = next(source.glob("*.safetensors"))
        save_file({name: array * np.float16(1.5) for name, array in load_file(weight).items()}, weight, metadata={"format": "pt"})
    if change == "size":
        with open(next((tmp_path / "fp8").glob("*.safetensors")), "r+b") as file:
            file.truncate(100)
    with pytest.raises(OutputError, match="fp8 exists and is not empty"):
        api.convert_all(source, [target.to(tmp_path / "fp8"), TARGETS["int4"].to(tmp_path / "int4")])
    assert not (tmp_path / "int4").exists() and not list(tmp_path.glob(".*"))


def test_resumed_after_a_failure(model: Path, single: dict[str, Path], tmp_path: Path) -> None:
    """Both journals are taken; an output begun alone goes on among others, with tiles cut elsewhere."""
    def interrupted(count: int, rows: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            few = Resources(tile_rows=rows, workers=1)
            api.convert_all(model, outputs(tmp_path)[:count], few, meter=Meter(late(), every=0))

    interrupted(1, 24)
    interrupted(4, 40)
    report = api.convert_all(model, outputs(tmp_path), Resources(tile_rows=56))
    assert [written.resumed > 0 for written in report.outputs] == [True, True, True, True, False, False]
    assert report.bytes_read == weights(model)
    for name in TARGETS:
        assert files(tmp_path / name) == files(single[name]), name


def test_what_was_damaged_is_made_again_for_that_output_alone(model: Path, single: dict[str, Path], tmp_path: Path) -> None:
    two = outputs(tmp_path, {name: TARGETS[name] for name in ("int4", "fp8")})
    few = Resources(tile_rows=16, workers=1)
    with pytest.raises(KeyboardInterrupt):
        api.convert_all(model, two, few, meter=Meter(late(), every=0))
    partial = next((tmp_path / ".fp8.streamconv-partial").glob("*.safetensors"))
    data = np.fromfile(partial, np.uint8)
    data[4096:] ^= 1
    data.tofile(partial)
    report = api.convert_all(model, two, few)
    assert report.outputs[0].resumed > report.outputs[1].resumed
    for name in ("int4", "fp8"):
        assert files(tmp_path / name) == files(single[name]), name


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ("a", "a", "two outputs are to be written to"),
        ("a", "b/../a", "two outputs are to be written to"),
        ("a", "a/b", "is in output"),
        ("a/b", "a", "is in output"),
        (".b.streamconv-partial", "b", "is in output"),
        ("a", "model/b", "is in the source folder"),
        ("a", "model", "is the source folder"),
    ],
)
def test_places_that_outputs_must_not_have(one: str, two: str, message: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match=message):
        api.convert_all(tmp_path / "model", [TARGETS["fp8"].to(tmp_path / one), TARGETS["int4"].to(tmp_path / two)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "model"] and not list((tmp_path / "b").iterdir())


def test_errors_name_the_output(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamconvError, match=r"^output .*two: ") as caught:
        api.convert_all(model, [TARGETS["fp8"].to(tmp_path / "one"), TensorRTLLM(tp_size=3).to(tmp_path / "two")])
    assert isinstance(caught.value, (RefusedError, UsageError)) and not list(tmp_path.iterdir())


def test_the_memory_of_one(model: Path) -> None:
    """Tasks of a tile follow each other: the smallest arena is that of the most_expensive output, not of all."""
    from streamconv.allocation import costs_of

    plans = [api.open_and_plan(model, target)[1] for target in TARGETS.values()]
    each = [max(cost.smallest() for cost in costs_of(Reads([plan]))) for plan in plans]
    together = Reads(plans)
    costs = costs_of(together)
    for cost, read in zip(costs, together, strict=True):
        single = [memory_cost(plans[share.output], share.span) for share in read.shares]
        assert cost.per_row == max(per_row for per_row, _ in single) and cost.align % max(align for _, align in single) == 0
    assert max(cost.smallest() for cost in costs) <= 2 * max(each)


def memory_cost(plan: streamconv.Plan, span: int) -> tuple[int, int]:
    from streamconv.planning.memory_plan import tile_cost

    cost = tile_cost(plan.spans[span], plan.matrices)
    return cost.per_row, cost.align


def test_from_python(model: Path, single: dict[str, Path], tmp_path: Path) -> None:
    report = streamconv.convert(model, TARGETS["int4"].to(tmp_path / "a"), TARGETS["fp8"].to(str(tmp_path / "b")))
    assert len(report.outputs) == 2 and files(tmp_path / "b") == files(single["fp8"])
    for wrong in ((tmp_path / "c", TARGETS["int4"].to("d")), (TARGETS["int4"].to("c"), TARGETS["fp8"])):
        with pytest.raises(UsageError, match="output"):
            streamconv.convert(model, *wrong)  # type: ignore[call-overload]
    assert json.loads((tmp_path / "a" / "streamconv.json").read_text())["target"] == "trtllm"
