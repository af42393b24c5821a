"""What calibration reads of a text and counts before it begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamconv import memory
from streamconv.calibration import texts
from streamconv.calibration.held import Held
from streamconv.calibration.texts import load_texts
from streamconv.errors import BudgetError, UsageError
from streamconv.hub import open_source
from streamconv.targets.trtllm.target import model_of
from tests import tiny


def test_samples_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\n\n\n three \n\nfour\n \nfive")
    rows = [{"text": "six\u2028seven"}, {"article": "eight", "text": "no"}, {"content": 9}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    found = ["one\ntwo", "three", "four\n \nfive", "six\u2028seven", "eight", "9"]
    assert load_texts(str(tmp_path), -1) == found and load_texts(str(tmp_path), 2) == found[:2]


def test_marks_and_empty_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n   \n{"text": "three"}\n\n')
    assert load_texts(str(tmp_path), -1) == ["one", "two", "three"]


@pytest.mark.parametrize("value", [None, True, ["one"], {"one": 1}, "half \ud800"])
def test_values_that_are_no_text(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + json.dumps({"text": value}))
    with pytest.raises(UsageError, match="line 2 holds no text"):
        load_texts(str(tmp_path / "a.jsonl"), -1)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_tables_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"text": "one"}]')
    with pytest.raises(UsageError, match="is a table"):
        load_texts(str(tmp_path / name), -1)


def test_no_more_is_read_than_is_used(tmp_path: Path) -> None:
    """Neither of a large file nor of what comes after the last sample."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\n\n" + b" " * (1 << 16) + b"\xff")
    assert load_texts(str(path), 2) == ["one", "two"]
    with pytest.raises(UsageError, match="utf-8"):
        load_texts(str(path), 3)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "line.txt").write_text("x" * 200)
    monkeypatch.setattr(texts, "_LONGEST_LINE", 100)
    for name in ("pipe.txt", "zeros.txt", "deep.jsonl", "line.txt"):
        with pytest.raises(UsageError):
            load_texts(str(tmp_path / name), 1)


def test_a_sample_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 1_000_000)
    with memory.bounded(memory.resident() + 50 * memory.MIB), pytest.raises(BudgetError, match="one sample"):
        load_texts(str(path), 1)


def test_what_grows_is_counted(tmp_path: Path) -> None:
    """The tokenizer, the results of all layers, and the largest layer, which need not be the first."""

    def held(folder: Path, kept: int) -> Held:
        with open_source(folder) as index:
            return Held.of(index, *model_of(index), 1, 4, 0, lambda rows, cols: kept * (rows + cols))

    folder = tiny.write(tmp_path / "model")
    before = held(folder, 0)
    linear = [value.shape for name, value in tiny.tensors().items() if "layers" in name and value.ndim == 2]
    assert held(folder, 1000).results - before.results == 1000 * sum(map(sum, linear))
    (folder / "tokenizer.json").write_bytes(b" " * (1 << 20))
    assert held(folder, 0).words - before.words >= 20 << 20
    assert held(folder, 0).host("cpu") - before.host("cpu") >= 20 << 20
