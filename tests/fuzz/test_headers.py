"""Twenty thousand mutated headers and index files, against the stock readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.differential import BOTH_REJECT, EQUAL, ONLY_STOCK, judge_file, judge_index, run
from tests.fuzz.mutate import pack


@pytest.mark.parametrize("seed", range(4))
def test_mutated(seed: int, tmp_path: Path) -> None:
    verdicts, wrong = run(5000, seed, tmp_path)
    assert not wrong, "\n".join(wrong[:5])
    # the cases are worth something only if all that can come out does come out
    for kind in ("file", "index"):
        assert verdicts[f"{kind}: {EQUAL}"] > 100 and verdicts[f"{kind}: {BOTH_REJECT}"] > 300
    assert sum(count for verdict, count in verdicts.items() if ONLY_STOCK in verdict) > 50
    assert not [verdict for verdict in verdicts if "other:" in verdict]


def test_the_judges_see_a_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = pack(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab")
    assert judge_file(file) == EQUAL
    monkeypatch.setattr("tests.fuzz.differential.stock", lambda file: None)
    with pytest.raises(AssertionError, match="stock rejects it"):
        judge_file(file)
    monkeypatch.setattr("tests.fuzz.differential.stock", lambda file: {"a": ("U8", (2,), b"xy")})
    with pytest.raises(AssertionError):
        judge_file(file)
    monkeypatch.setattr("tests.fuzz.differential.read_weight_map", lambda path, present: {"a": "m-2.safetensors"})
    with pytest.raises(AssertionError):
        judge_index(b'{"weight_map":{"a":"m-1.safetensors"}}', tmp_path / "model.safetensors.index.json")
