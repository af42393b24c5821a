"""Two outputs of one run: killed at any operation, each is whole or not there, and the same command finishes both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv import api
from streamconv.options import Resources
from streamconv.run.fs import Disk
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash import kills
from tests.crash.disks import Counting, Tapped
from tests.crash.world import World, fast_folder, no_thread, restore, snapshot, write_model


class Two(World):
    """A conversion of one tiny model into two outputs."""

    def __init__(self, root: Path, tile_rows: int = 32) -> None:
        self.mounted, self.force, self.batch = False, False, 0
        self.root, self.tile_rows, self.place = root, tile_rows, root / "place"
        self.model = write_model(root / "model")
        self.start = {}
        self.targets = [
            TensorRTLLM(quant="int8", target_sm=80).to(self.place / "one"),
            HuggingFace(quant="fp8_dynamic").to(self.place / "two"),
        ]
        self.rights = []
        for output in self.targets:
            restore(self.place, self.start)
            api.convert(self.model, output.out, output.target)  # alone
            self.rights.append(snapshot(Path(output.out)))
        self.reset()

    def run(self, disk: Disk | None = None, **resources: int | None) -> api.Report:
        asked = Resources(memory_budget=4 << 30, workers=1, device="cpu", tile_rows=self.tile_rows)
        disk = disk or Counting()
        if isinstance(disk, Tapped):
            disk.mounted = False
        with no_thread(self.batch):
            return api.convert_all(self.model, self.targets, asked, disk=disk)

    def wrong_now(self) -> str:
        for output, right in zip(self.targets, self.rights, strict=True):
            if os.path.lexists(output.out) and snapshot(Path(output.out)) != right:
                return f"{output.out} looks finished, and is not"
        return ""

    def wrong_end(self) -> str:
        left = set(os.listdir(self.place)) - {"one", "two"}
        return f"left behind: {sorted(left)}" if left else self.wrong_now()


@pytest.fixture
def world() -> Iterator[Two]:
    root = fast_folder()
    yield Two(root, tile_rows=1000)
    shutil.rmtree(root)


def test_killed_at_every_third_operation_twice(world: Two) -> None:
    count = kills.real_kills(world, depth=2, stop=kills.raised, step=3)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases >= 30, count


@pytest.mark.slow
def test_killed_at_every_operation(world: Two) -> None:
    """And in the middle of every write, with every file as the kill leaves it."""
    count = kills.every_state(world, depth=1)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases >= 100, count


class Replaced(World):
    """A Hugging Face directory with side files that takes the place of one of another format, with --force."""

    def __init__(self, root: Path, tile_rows: int = 1000) -> None:
        self.mounted, self.force, self.batch = False, True, 0
        self.root, self.tile_rows, self.place = root, tile_rows, root / "place"
        self.out = self.place / "out"
        self.model = write_model(root / "model")
        (self.model / "tokenizer.json").write_text("{}")
        (self.model / "gone.txt").write_text("only in the older output")
        self.options = HuggingFace(quant="w4a16", format="modelopt", group_size=32)  # type: ignore[assignment]
        self.start = {}
        self.reset()
        self.run()
        self.start = snapshot(self.place)
        (self.model / "gone.txt").unlink()
        self.options = HuggingFace(quant="fp8_dynamic")  # type: ignore[assignment]
        self.reset({})
        self.run()
        self.right = snapshot(self.out)
        self.reset()


def test_a_replaced_directory_killed_at_every_fourth_operation_twice() -> None:
    root = fast_folder()
    try:
        count = kills.real_kills(Replaced(root), depth=2, stop=kills.raised, step=4)
    finally:
        shutil.rmtree(root)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases >= 15, count
