"""Module names in lists of a config: exact, globs, or `re:` and a regular expression; none of them can take for ever."""

from __future__ import annotations

import fnmatch
import re
import time
import warnings
from collections.abc import Iterator, Sequence

from streamconv.errors import VerifyError, printable

_LONGEST, _LONGEST_NAME, _MOST_LOOPS, _MOST_WIDE, _MOST_SECONDS = 1000, 300, 8, 3, 20.0
_LOOP = re.compile(r"(?<!\\)[*+{]")
_DIGITS = re.compile(r"\\d[*+{]|\[0-9\][*+{]")
_NESTED = re.compile(r"(?<!\\)\)[*+{]")


class Patterns:
    """Whether a name is one of a list's.

    Args:
        globs: `*` and `?` mean something outside of regular expressions too, and parts of a name stand for all that hold them.

    Attributes:
        listed: all of the list.
        names: those that are names.
        wrong: what of the list is no pattern, in words that follow the list's name.
    """

    def __init__(self, patterns: Sequence[str], globs: bool) -> None:
        self.wrong: list[str] = []
        self._parts = globs
        self.names: set[str] = set()
        self.listed = set(patterns)
        self._tried: list[re.Pattern[str]] = []
        self._seconds = 0.0
        for pattern in patterns:
            if pattern.startswith("re:"):
                self._add(pattern[3:], pattern)
            elif globs and any(letter in pattern for letter in "*?["):
                self._add(fnmatch.translate(re.sub(r"\*+", "*", pattern)), pattern)
            else:
                self.names.add(pattern)
                if "*" in pattern:
                    self.wrong.append(f"holds {printable(pattern)}, a glob, which engines take for a name")

    def _add(self, expression: str, pattern: str) -> None:
        loops, wide = len(_LOOP.findall(expression)), len(_LOOP.findall(_DIGITS.sub("", expression)))
        if len(expression) > _LONGEST or loops > _MOST_LOOPS or wide > _MOST_WIDE or _NESTED.search(expression):
            self.wrong.append(f"holds {printable(pattern, 80)}, a regular expression that may take for ever")
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._tried.append(re.compile(expression))
        except (re.error, OverflowError, RecursionError) as error:
            self.wrong.append(f"holds {printable(pattern, 80)}, no regular expression: {error}")

    def match(self, name: str) -> bool:
        """Regular expressions are matched from the start of the name.

        Raises:
            VerifyError: the expressions take more time than any that are meant well.
        """
        if name in self.names or (self._parts and not self.names.isdisjoint(_within(name))):
            return True
        if not self._tried or len(name) > _LONGEST_NAME:
            return False
        began = time.monotonic()
        matched = any(expression.match(name) for expression in self._tried)
        self._seconds += time.monotonic() - began
        if self._seconds > _MOST_SECONDS:
            raise VerifyError("the regular expressions of the quantization_config take too long to match")
        return matched


def _within(name: str) -> Iterator[str]:
    """Every run of parts of a name: "mlp.gate" of "model.layers.0.mlp.gate"."""
    parts = name.split(".")[:30]
    for first in range(len(parts)):
        for last in range(first + 1, len(parts) + 1):
            yield ".".join(parts[first:last])
