"""The page: headings, figures as SVG and their tables, in one HTML file."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamconv import __version__
from streamconv.errors import OutputError, UsageError, printable, visible
from streamconv.memory import limit, show_size
from streamconv.planning.memory_plan import processors

MARK = "<!doctype html>\n<!-- streamconv report -->"
"""How a report begins: only such a file is replaced."""
_PACKAGES = ("numpy", "numba", "torch", "safetensors", "transformers", "xxhash")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under a header; `numbers` are the columns that are set flush right."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        text: a sentence or two under the heading.
        figure: SVG whose texts are escaped, empty if there is none.
        table: the figure's numbers, or all there is.
        code: set as it is.
    """

    heading: str
    text: str = ""
    figure: str = ""
    table: Table | None = None
    code: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """All of it.

    Attributes:
        summary: what happened, one sentence.
        facts: (what, value) in a few words each.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default=())
    warnings: Sequence[str] = field(default=())


def check(path: str | Path) -> None:
    """Refuse to replace what is no report, and find out whether there will be a page, before hours of work.

    Raises:
        UsageError: Jinja2 is not installed, or another file has the name. OutputError: the folder takes no file.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UsageError("--report needs Jinja2", hint="pip install 'streamconv[report]'") from None
    path, shown = Path(path), printable(path)
    try:
        with path.open("rb") as file:
            if file.read(len(MARK)) not in (MARK.encode(), b""):
                raise UsageError(f"--report {shown}: the file is no report of streamconv, and stays", hint="choose another name")
    except FileNotFoundError:
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"--report {shown}: nothing can be written in that folder") from None
    except OSError as error:
        raise OutputError(f"--report {shown} cannot be written: {error.strerror}") from None


def render(page: Page) -> str:
    """The HTML; every text of the page is escaped, and made visible where it would not be."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    room.filters |= {"visible": visible, "svg": Markup}
    return MARK + room.get_template("page.html").render(page=page)


def write(name: str, page: Page) -> None:
    """Write the page beside the file of that name, and take its place. Raises OutputError: the disk does not take it."""
    text = render(page).encode("utf-8", "backslashreplace")
    path = Path(name)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(text)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"--report {printable(path)} cannot be written: {error.strerror}") from None


def machine() -> Section:
    """Processor, memory, kernel and versions; none of the packages is imported."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    name = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    ceiling = limit()
    facts = {
        "processor": f"{name}, {processors()} usable",
        "memory": show_size(psutil.virtual_memory().total) + (f", limit of the container {show_size(ceiling)}" if ceiling else ""),
        "kernel": f"{os.uname().sysname} {os.uname().release}",
        "streamconv": __version__,
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return Section("Machine and versions", table=Table(("what", "value"), [*facts.items()]))
