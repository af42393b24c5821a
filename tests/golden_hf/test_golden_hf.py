"""Every golden case through `streamconv convert --to hf`: the tools' bytes in every tensor, a true index, a config that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.run.manifest import NAME
from streamconv.verification.check import verify
from tests.golden_hf import cases
from tests.golden_hf.cases import Case, check
from tests.golden_hf.conftest import Models, convert

CASES = cases.load()


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_case(case: Case, models: Models, tmp_path: Path) -> None:
    source = models.source(case)
    convert(case, source, tmp_path / "out")
    check(case, source, tmp_path / "out")
    verdict = verify(tmp_path / "out")
    assert not verdict.problems and verdict.hashed == verdict.tensors
    (tmp_path / "out" / NAME).unlink()  # judged as another tool's
    assert not verify(tmp_path / "out").problems


def test_all_cases_are_here() -> None:
    assert len(CASES) == 211
