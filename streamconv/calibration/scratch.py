"""What a calibration keeps between layers: hidden states and the ranges so far, so that a killed run goes on.

    .NAME.streamconv-calibrate/state.json           layers done, and of which request
                               states-N             hidden states that go into layer N, sample after sample
                               ranges-N.safetensors ranges of the layers before N
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.errors import OutputError, printable
from streamconv.run.fs import hidden, translate_errors

if TYPE_CHECKING:
    import torch


class Scratch:
    """The folder of an unfinished calibration.

    Attributes:
        done: layers whose ranges are in `ranges` and whose outcome is in a file.
        ranges: by name; what is there is saved with the states.

    Args:
        out: the ranges file that is being made.
        mark: what decides the numbers; work with another mark is thrown away.
        size: bytes of the states of all samples.
    """

    def __init__(self, out: Path, mark: str, size: int) -> None:
        self.folder, self.mark = hidden(out, "calibrate"), mark
        self.ranges: dict[str, torch.Tensor] = {}
        if os.path.lexists(self.folder) and (os.path.islink(self.folder) or self.folder.lstat().st_uid != os.geteuid()):
            shown = printable(self.folder)
            raise OutputError(f"{shown} is not what a calibration of yours leaves there", hint="look at it, then move it away or remove it")
        self.done = self._resume(size)
        if not self.done:
            with translate_errors(self.folder, "write"):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)

    def states(self, number: int) -> Path:
        """File of the hidden states that go into layer `number`."""
        return self.folder / f"states-{number}"

    def saved(self, number: int) -> None:
        """The states that go into layer `number` are synced, and `ranges` holds those of the layers before it."""
        from safetensors.torch import save_file

        with translate_errors(self.folder, "write"):
            new = self._ranges(number)
            save_file(self.ranges, new)
            _sync(new)
            state = self.folder / "state.json.new"
            state.write_text(json.dumps({"mark": self.mark, "layers": number}))
            _sync(state)
            os.replace(state, self.folder / "state.json")
            self.states(self.done).unlink(missing_ok=True)
            self._ranges(self.done).unlink(missing_ok=True)
            self.done = number

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ranges(self, number: int) -> Path:
        return self.folder / f"ranges-{number}.safetensors"

    def _resume(self, size: int) -> int:
        """Layers that an interrupted run of the same request has done."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = json.loads((self.folder / "state.json").read_text())
            if state["mark"] != self.mark:
                return 0
            done = int(state["layers"])
            if self.states(done).stat().st_size != size:
                return 0
            self.ranges = load_file(self._ranges(done))
            return done
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return 0


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
