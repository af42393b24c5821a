"""README.md of the output: the source's model card, with what was done to the weights. Nothing is looked up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv import __version__
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.untrusted import DEEPEST, deeper_than, read_file
from streamconv.errors import StreamconvError
from streamconv.planning.plan import SideFile

NAME = "README.md"
_LARGEST = 4 << 20
_LONGEST_FRONT = 64 << 10
"""Bytes of front matter that is read."""
_FRONT = re.compile(r"\A(?:\ufeff)?---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--([A-Za-z0-9][\w.-]*)--([A-Za-z0-9][\w.-]*)")


@dataclass(frozen=True, slots=True)
class Done:
    """What was done to the weights.

    Attributes:
        quant: what --quant was.
        container: of the quantized weights.
        arithmetic: what --arithmetic was.
        quantized: how many linear layers.
        left: those that stay as they are, with layer numbers as *, and how many there are of each.
    """

    quant: str
    container: str
    arithmetic: str
    quantized: int
    left: Mapping[str, int]


def card(index: Index, done: Done, copied: Sequence[SideFile]) -> SideFile:
    """The model card.

    Args:
        copied: files of the source, its card among them.
    """
    own = next((file for file in copied if file.name == NAME), None)
    head, body = _source(own)
    base = _repository(index)
    if base is not None:
        head |= {"base_model": base, "base_model_relation": "quantized"}
    listed = head.get("tags")
    tags = [tag for tag in listed if isinstance(tag, str)] if isinstance(listed, list) else []
    head["tags"] = list(dict.fromkeys([*tags, "quantized", done.quant, done.container, "streamconv"]))
    import yaml

    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1 << 16)
    text = f"---\n{front}---\n\n{_told(done, base)}\n{body.lstrip(chr(10))}"
    data = text.encode(errors="replace")
    return SideFile(NAME, len(data), data)


def _source(file: SideFile | None) -> tuple[dict[str, Any], str]:
    """Front matter and body of the source's card; what is no card counts as none."""
    if file is None or file.source is None or file.size > _LARGEST:
        return {}, ""
    if file.fetch is not None:
        file.fetch()
    try:
        text = read_file(file.source, _LARGEST).decode().replace("\r\n", "\n")
    except (StreamconvError, UnicodeDecodeError):
        return {}, ""
    front = _FRONT.match(text)
    if front is None:
        return {}, text
    return _parsed(front[1]), text[front.end() :]


def _parsed(text: str) -> dict[str, Any]:
    """Front matter; nothing of what is not plain YAML."""
    import yaml

    try:
        # an alias can stand for itself, or make a short text mean a long one
        if len(text) > _LONGEST_FRONT or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            return {}
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(parsed, dict) or deeper_than(parsed, DEEPEST):
        return {}
    return {key: value for key, value in parsed.items() if isinstance(key, str)}


def _repository(index: Index) -> str | None:
    """What the Hub calls the source, where that can be known; the name of a folder says nothing."""
    if index.repo is not None:
        return index.repo
    for part in Path(index.root).parts:
        if match := _SNAPSHOT.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    named = index.config.get("_name_or_path")
    return named if isinstance(named, str) and _REPO.fullmatch(named) else None


def _told(done: Done, base: str | None) -> str:
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    left = ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in done.left.items()) or "none"
    rows = {
        "weights": done.quant,
        "container": done.container,
        "arithmetic": done.arithmetic,
        "linear layers quantized": done.quantized,
        "left as they are": left,
        "made with": f"streamconv {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"Quantized version{of}.\n\n| | |\n| --- | --- |\n{table}\n"
