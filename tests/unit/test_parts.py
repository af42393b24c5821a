"""How plans are cut into parts: everything in one part, and what belongs together stays together."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv import api
from streamconv.errors import UsageError
from streamconv.families import all_families
from streamconv.planning.parts import cut
from streamconv.planning.plan import Plan
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.conformance.recipes import RECIPES
from tests.conformance.sources import RUNS, make

LLAMA = next(recipe for recipe in RECIPES if str(recipe) == "llama")
FAMILY = next(family for family in all_families() if family.name == "llama")
CASES = [pytest.param(quant, runs[0], id=quant) for quant, runs in RUNS.items()]


def _check(plan: Plan, count: int) -> None:
    parts = cut(plan, count)
    assert len(parts) == count
    assert sorted(number for part in parts for number in part.matrices) == list(range(len(plan.matrices)))
    assert sorted(number for part in parts for number in part.spans) == list(range(len(plan.spans)))
    assert [constant for part in parts for constant in part.constants] == list(plan.constants)
    assert sum(part.read for part in parts) == plan.bytes_read, "each byte is read by one part"
    taken: list[list[tuple[int, int]]] = [[] for _ in plan.files]
    for part in parts:
        alone = part.of(plan)
        reduced = {span.reduce.key for span in alone.spans if span.reduce is not None}
        for matrix in alone.matrices:
            assert set(matrix.codec.needs) <= reduced
        assert {dest.matrix for span in alone.spans for dest in span.dests} <= set(range(len(part.matrices)))
        fed = [0] * len(part.matrices)
        for span in alone.spans:
            for dest in span.dests:
                fed[dest.matrix] += span.op.out_rows(span.stop - span.start)
        assert fed == [matrix.filled for matrix in alone.matrices]
        for ranges, own in zip(taken, part.extents(plan), strict=True):
            ranges += own
    for file, ranges in zip(plan.files, taken, strict=True):
        at = len(file.header)
        for begin, end in sorted(ranges):
            assert begin == at, "the parts' bytes follow each other without a gap"
            at = end
        assert at == file.size


@pytest.mark.parametrize(("quant", "run"), CASES)
def test_every_quant(quant: str, run: object, tmp_path: Path) -> None:
    source = make(LLAMA, FAMILY, run, tmp_path / "in")  # type: ignore[arg-type]
    index, plan = api.open_and_plan(source.folder, source.options(quant, run))  # type: ignore[arg-type]
    with index:
        for count in (1, 2, 7, 100):
            _check(plan, count)


@pytest.mark.parametrize("quant", ["none", "fp8_dynamic", "mxfp4"])
def test_a_hugging_face_directory(quant: str, tmp_path: Path) -> None:
    index, plan = api.open_and_plan(tiny.write(tmp_path / "in"), HuggingFace(quant=quant))
    with index:
        for count in (2, 5):
            _check(plan, count)


def test_what_is_above_the_mean_is_alone_and_first(tmp_path: Path) -> None:
    index, plan = api.open_and_plan(tiny.write(tmp_path / "in"), TensorRTLLM(tp_size=4))
    with index:
        first, *others = cut(plan, 16)
        assert {plan.matrices.name(number) for number in first.matrices} == {"transformer.vocab_embedding"}
        assert first.moved == max(part.moved for part in [first, *others]) and first.alone


@pytest.mark.parametrize("count", [0, 5000])
def test_no_such_number(count: int, tmp_path: Path) -> None:
    index, plan = api.open_and_plan(tiny.write(tmp_path / "in"), TensorRTLLM())
    with index, pytest.raises(UsageError, match="is not between 1 and 4096"):
        cut(plan, count)
