"""Standard input, output and error of a process: there, silent, and harmless to a terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from streamconv.errors import visible

_CURSOR = re.compile(r"(?:\x1b\[A|[\r\n])+")
"""What a progress bar writes by itself to go from line to line."""


class VisibleStream:
    """A text stream that shows what a terminal would act upon, and escapes what its encoding lacks; line ends stay."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: Any) -> Any:
        return self._stream.write(self.shown(text))

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def shown(self, text: Any) -> Any:
        """What the stream is given for `text`."""
        if not isinstance(text, str) or _CURSOR.fullmatch(text):
            return text
        start = "\r" if text.startswith("\r") else ""  # a bar begins its line anew
        lines = "\n".join(map(visible, text[len(start) :].replace("\t", "    ").split("\n")))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return (start + lines).encode(encoding, "backslashreplace").decode(encoding)


def open_standard_streams() -> None:
    """Put /dev/null where standard input, output or error is closed: the next file that is opened would take its place."""
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, flags)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if flags else "r", closefd=False))  # noqa: SIM115
        os.set_inheritable(number, True)


def ask_nothing() -> None:
    """Read no standard input: no library may ask a question there and wait for the answer."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
