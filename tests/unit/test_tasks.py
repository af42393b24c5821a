"""What is encoded from a span's rows is decided once, and not again for each tile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import streamconv
from streamconv.planning.plan import Matrix, RowRange
from streamconv.planning.tasks import encode_tasks
from streamconv.run import output_state
from tests import tiny


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_tasks_of_a_span_are_computed_once(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[tuple[str, int]] = Counter()

    def counted(span: RowRange, matrices: list[Matrix]) -> object:
        asked[span.source.name, span.start] += 1
        return encode_tasks(span, matrices)

    monkeypatch.setattr(output_state, "encode_tasks", counted)
    target = streamconv.TensorRTLLM(tp_size=2, quant=quant, target_sm=80 if quant == "int8" else None)
    resources = streamconv.Resources(workers=1, tile_rows=64)  # of two workers both may ask first
    report = streamconv.convert(tiny.write(tmp_path / "model"), tmp_path / "out", target, resources=resources)
    assert report.tiles > len(asked) > 10
    assert set(asked.values()) == {1}
