"""Calibration samples: where they come from and how the official loop prepares them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from streamconv.calibration.pretrained import read_tokenizer, told
from streamconv.calibration.request import Loop
from streamconv.checkpoint.untrusted import open_regular, shown_value
from streamconv.errors import UsageError, printable
from streamconv.memory import MIB, check_room

_COLUMNS = ("article", "text", "content")
_TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow")
_HALF = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no tokenizer takes."""
_LONGEST_LINE = 1 << 26
_TOKENIZING, _TOKEN = 50, 32
"""Bytes that tokenizing takes for each character, and that each token takes until the first layer (measured, rounded up)."""


def load_texts(source: str, count: int) -> list[str]:
    """The first `count` samples (-1: all) in order.

    Args:
        source: a .txt file (samples are separated by blank lines), a .jsonl file (key article, text or content), a folder
            of such files, or the name of a data set on the Hub (needs the package `datasets`).

    Raises:
        UsageError: nothing readable is there.
    """
    path = Path(source)
    samples: Iterator[str]
    if os.path.isdir(path):
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".md"))
        if not files:
            raise UsageError(f"--text {printable(source)}: no .txt or .jsonl file in the folder")
        samples = (text for file in files for text in _file(file))
    elif os.path.exists(path):
        samples = _file(path)
    elif path.suffix or source.startswith((".", "/")) or source.count("/") > 1:  # no name of a data set
        raise UsageError(f"--text {printable(source)} does not exist")
    else:
        samples = iter(_hub(source, count))
    texts = list[str]()
    for text in islice(filter(str.strip, samples), count if count >= 0 else None):
        check_room(_TOKENIZING * len(text), f"one sample of --text {printable(source)}, {len(text)} characters,")
        texts.append(text)
    if not texts:
        raise UsageError(f"--text {printable(source)} holds no text")
    return texts


def _file(path: Path) -> Iterator[str]:
    """The samples of a file, one after the other: no more of it is read than is used."""
    shown = f"--text {printable(path)}"
    if path.suffix in _TABLES:
        raise UsageError(f"{shown} is a table, and not text", hint="write it as .jsonl, a line for each sample: {\"text\": ...}")
    try:
        with open(open_regular(path, UsageError), encoding="utf-8-sig") as file:
            yield from (_rows if path.suffix == ".jsonl" else _blocks)(file, shown)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown}: {error}") from error


def _blocks(file: TextIO, shown: str) -> Iterator[str]:
    """What stands between blank lines."""
    block = list[str]()
    for line in _lines(file, shown):
        if line == "\n":
            yield "".join(block).strip()
            block.clear()
        else:
            block.append(line)
            check_room(len(line), f"a block of {shown}")
    yield "".join(block).strip()


def _rows(file: TextIO, shown: str) -> Iterator[str]:
    """What each line of JSON holds; empty lines hold nothing."""
    for number, line in enumerate(_lines(file, shown), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = next(row[key] for key in _COLUMNS if key in row)
        except (ValueError, StopIteration, TypeError, RecursionError) as error:
            raise UsageError(f"{shown}: line {number} has none of {', '.join(_COLUMNS)}") from error
        if not isinstance(text, str | int | float) or isinstance(text, bool) or _HALF.search(str(text)):
            raise UsageError(f"{shown}: line {number} holds no text, but {shown_value(text)}")
        yield str(text)


def _lines(file: TextIO, shown: str) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise UsageError(f"{shown} has a line of more than {_LONGEST_LINE} characters", hint="samples are blocks between blank lines")
        yield line


def _hub(name: str, count: int) -> list[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UsageError(
            f"there is no file or folder {printable(name)} here to calibrate on, and a data set of the Hub needs the package datasets",
            hint="a text file works offline: --text FILE.txt (NVIDIA's flag: --calib_dataset FILE.txt); or pip install datasets",
        ) from None
    # the columns and splits of the official converter
    split, column, config = "train", "text", None
    if "cnn_dailymail" in name:
        column, config = "article", "3.0.0"
    elif "lambada" in name:
        split = "validation"
    try:
        rows = load_dataset(name, name=config, split=split, trust_remote_code=False)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"there is no file or folder {printable(name)} here to calibrate on, and as a data set of the Hub: {printable(why)}"
        ) from error
    return [str(row[column]) for _, row in zip(range(count if count >= 0 else len(rows)), rows, strict=False)]


def tokenize(folder: Path, texts: list[str], max_length: int, loop: Loop = "trtllm") -> list[list[int]]:
    """Token ids of each sample, prepared as the official loop does (ModelOpt adds no suffix).

    Raises:
        CheckpointError: the model folder has no usable tokenizer.
    """
    tokenizer, ids, count = read_tokenizer(folder), list[list[int]](), 0
    known: dict[int, int] = {}  # each number once
    with told(f"{printable(folder)}: the tokenizer fails"):
        for text in texts:
            prepared = text if loop == "modelopt" else (text + " TL;DR: ").strip().replace(" n't", "n't")
            rows = tokenizer(prepared, truncation=True, max_length=max_length)["input_ids"]
            ids.append([known.setdefault(token, token) for token in map(int, rows)])
            count += len(ids[-1])
            check_room(_TOKEN * count, f"reading on after {len(ids)} of {len(texts)} samples ({count} tokens)")
    return [sample for sample in ids if sample]


_GROUP = 32 * MIB
"""Bytes of embedded samples that are made together."""


def batches_of(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """Neighbours of equal length go together: no padding, so batching changes nothing but speed."""
    batches: list[list[list[int]]] = []
    for sample in ids:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(sample):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def groups_of(samples: list[list[int]], token_bytes: int) -> Iterator[list[list[int]]]:
    """Samples whose embeddings are read together, so that rows that they share are read once."""
    group: list[list[int]] = []
    for sample in samples:
        if group and sum(map(len, group), len(sample)) * token_bytes > _GROUP:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
