"""Results of reductions while tiles are worked on out of order."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from streamconv.lazy import np
from streamconv.planning.plan import RowRange
from streamconv.run.order import Stop


class ReductionResults:
    """Merges what tiles contribute to a reduction; whoever needs the result waits until the last tile is in.

    Spans that reduce come before those that need them and tiles are handed out in that order, so whoever is waited for is
    always at work. What is kept is small: two bytes for each input channel, and scalars.
    """

    def __init__(self, spans: Iterable[RowRange]) -> None:
        self._missing: dict[str, int] = {}
        for span in spans:
            if span.reduce is not None:
                self._missing[span.reduce.key] = self._missing.get(span.reduce.key, 0) + span.stop - span.start
        self._values: dict[str, np.ndarray[Any, Any]] = {}
        self._change = threading.Condition()
        self._stopped = False

    def add(self, key: str, rows: int, value: np.ndarray[Any, Any]) -> None:
        """A tile of `rows` source rows found these maxima."""
        with self._change:
            known = self._values.get(key)
            self._values[key] = value if known is None else np.asarray(np.maximum(known, value))
            self._missing[key] -= rows
            self._change.notify_all()

    def get(self, key: str) -> np.ndarray[Any, Any]:
        """The result over all rows; always the same object.

        Raises:
            Stop: another worker failed.
        """
        with self._change:
            while self._missing[key] and not self._stopped:
                self._change.wait()
            if self._missing[key]:
                raise Stop
            return self._values[key]

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
