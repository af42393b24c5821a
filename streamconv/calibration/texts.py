"""Calibration samples: where they come from and how the official loop prepares them (quantization spec §16.1)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from streamconv.calibration.pretrained import read_tokenizer, told
from streamconv.calibration.request import Loop
from streamconv.errors import UsageError, printable

_COLUMNS = ("article", "text", "content")


def load_texts(source: str, count: int) -> list[str]:
    """The first `count` samples (-1: all) in order.

    Args:
        source: a .txt file (samples are separated by blank lines), a .jsonl file (key article, text or content), a folder
            of such files, or the name of a data set on the Hub (needs the package `datasets`).

    Raises:
        UsageError: nothing readable is there.
    """
    path = Path(source)
    if os.path.isdir(path):
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".md"))
        if not files:
            raise UsageError(f"--text {printable(source)}: no .txt or .jsonl file in the folder")
        texts = [text for file in files for text in _file(file)]
    elif os.path.exists(path):
        texts = _file(path)
    elif path.suffix or source.startswith((".", "/")) or source.count("/") > 1:  # no name of a data set
        raise UsageError(f"--text {printable(source)} does not exist")
    else:
        texts = _hub(source, count)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"--text {printable(source)} holds no text")
    return texts if count < 0 else texts[:count]


def _file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {printable(str(path))}: {error}") from error
    if path.suffix != ".jsonl":
        return [block.strip() for block in content.split("\n\n")]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            texts.append(next(str(row[key]) for key in _COLUMNS if key in row))
        except (ValueError, StopIteration, TypeError) as error:
            raise UsageError(f"--text {printable(str(path))}: line {number} has none of {', '.join(_COLUMNS)}") from error
    return texts


def _hub(name: str, count: int) -> list[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UsageError(
            f"there is no file or folder {printable(name)} here to calibrate on, and a data set of the Hub needs the package datasets",
            hint="a text file works offline: --text FILE.txt (NVIDIA's flag: --calib_dataset FILE.txt); or pip install datasets",
        ) from None
    # the columns and splits of the official converter (spec §16.1)
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
    """Token ids of each sample, prepared as the official loop does (ModelOpt adds no suffix, §16.2).

    Raises:
        CheckpointError: the model folder has no usable tokenizer.
    """
    tokenizer, ids = read_tokenizer(folder), list[list[int]]()
    with told(f"{printable(str(folder))}: the tokenizer fails"):
        for text in texts:
            prepared = text if loop == "modelopt" else (text + " TL;DR: ").strip().replace(" n't", "n't")
            ids.append([int(token) for token in tokenizer(prepared, truncation=True, max_length=max_length)["input_ids"]])
    return [sample for sample in ids if sample]
