"""The golden models and what is made of them, once for the whole folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.cli.main import main
from tests.golden_hf import cases, generate
from tests.golden_hf.cases import Case

Convert = Callable[..., Path]


class Models:
    """Makes a source when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.specs = root, generate.load_specs()

    def source(self, case: Case) -> Path:
        """The folder that a case converts."""
        place = self.root / case.model
        if place.exists():
            return place
        if case.model in self.specs:
            return generate.generate(self.specs[case.model], self.root)
        other = cases.load()[case.model]
        convert(other, self.source(other), place)
        return place


def convert(case: Case, source: Path, out: Path, *more: str) -> None:
    """Run a case's command line with `more` flags; it has to succeed."""
    budget = () if "--memory-budget" in more else ("--memory-budget", "1GiB")
    status = main(["convert", str(source), str(out), "--to", "hf", *case.arguments, "--quiet", *budget, *more])
    assert status == 0, f"{case.name}: exit status {status}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("golden_hf"))
