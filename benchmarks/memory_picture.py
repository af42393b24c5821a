"""Draws a memory trace as a picture that stands alone: `python -m benchmarks.memory_picture TRACE.jsonl PICTURE.svg`.

The README's is of `streamconv convert MODEL OUT --quant int8 --target-sm 90 --memory-budget 512MiB --memory-trace TRACE.jsonl` with the
2.2 GB model that `python -m benchmarks.make_model` writes.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

from streamconv.memory_trace import Sample
from streamconv.pages.timeline import sections


def style() -> str:
    """The page's rules for figures, in its light colours."""
    page = files("streamconv.pages").joinpath("page.html").read_text()
    colours = re.search(r":root \{[^}]*\}", page)
    rules = re.findall(r"svg [^{}]*\{[^}]*\}", page)
    return "\n".join([colours[0] if colours else "", "svg { background: #fff; font: 12px sans-serif; }", *rules])


def picture(lines: list[str]) -> str:
    """Resident set and budget over time; the memory cgroup of a machine holds other things too."""
    samples = [Sample(**json.loads(line))._replace(cgroup=None) for line in lines]
    return sections(samples)[0].figure.replace(">", f"><style>{style()}</style>", 1)


if __name__ == "__main__":
    trace, drawn = map(Path, sys.argv[1:3])
    drawn.write_text(picture(trace.read_text().splitlines()) + "\n")
