"""A resume and the end of a run notice a source that is not the one that was read, and no byte of an output is taken on trust."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamconv import api
from streamconv.checkpoint.shard import Identity, Shard
from streamconv.errors import OutputError, ResumeError, SourceChangedError
from streamconv.options import Resources
from streamconv.run import journal
from streamconv.run.fs import Disk, hidden
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.crash.kills import raised
from tests.crash.world import World, snapshot
from tests.unit.test_meta import PARAMS, WIDTH, weights


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def flip(path: Path, at: int = -1) -> None:
    """Change a bit of a file in place and put its times back."""
    told = path.stat()
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END)
        old = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


def overwrite(path: Path) -> None:
    flip(path)


def replace(path: Path) -> None:
    """Another file of the same bytes and times under the name."""
    shutil.copy2(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def link(path: Path) -> None:
    """Nothing but the change time is another."""
    os.link(path, path.with_name("other name"))


CHANGES = [(overwrite, "change time, content"), (replace, "change time, inode"), (touch, "modification time"), (link, "change time")]


@pytest.mark.parametrize(("change", "facts"), CHANGES)
def test_a_resume_names_what_changed_of_the_source(world: World, change: Callable[[Path], None], facts: str) -> None:
    assert raised(world, 90)
    change(world.model / "model.safetensors")
    hidden(world.out, "lock").unlink()
    before = snapshot(world.place)
    with pytest.raises(ResumeError, match=rf"source file model\.safetensors has another {facts}"):
        world.run()
    assert snapshot(world.place) == before


@pytest.mark.parametrize("change", [change for change, _ in CHANGES])
def test_the_end_of_a_run_notices_a_changed_source(world: World, change: Callable[[Path], None]) -> None:
    class Late(Disk):
        """The source changes while the last tiles are written."""

        done = False

        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            if not self.done:
                self.done = True
                change(world.model / "model.safetensors")
            return super().pwrite(fd, data, offset)

    with pytest.raises(SourceChangedError, match=r"model\.safetensors was replaced or changed"):
        world.run(Late())
    assert not world.out.exists()


def test_every_fact_of_a_file_counts(world: World) -> None:
    """Whatever an identity holds, now or later: a journal whose entry differs in it is another one, and says so."""
    index, plan = api.open_and_plan(world.model, world.options)
    with index:
        new = journal.identity(plan, index.shards)
        assert len(new["sources"][0]) == len(journal._FACTS)
        for number, fact in enumerate(journal._FACTS):
            old = new | {"sources": [[*entry] for entry in new["sources"]]}
            old["sources"][0][number] = "another"
            assert any("source file" in line and (fact in line or fact == "name") for line in journal.differences(old, new)), fact
        shard = index.shards[0]
        for number, fact in enumerate(Identity._fields):
            shard._identity = shard.identity._replace(**{fact: shard.identity[number] + 1})
            with pytest.raises(SourceChangedError):
                shard.check_unchanged()
            shard._identity = None
            shard.close()


def test_the_sample_sees_every_file_size(tmp_path: Path) -> None:
    for size in (1, 9, 4095, 4096, 4097, 100_000):
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        with Shard(path) as shard:
            before = shard.sample()
        for at in (1, size):
            flip(path, -at)
            with Shard(path) as shard:
                assert (at == size > 8 * 4096) or shard.sample() != before
            flip(path, -at)


def split_meta(folder: Path) -> Path:
    """One model in two folders whose parts bear the same name."""
    state = weights()
    for number in range(2):
        inner = folder / f"consolidated.{number:02d}"
        inner.mkdir(parents=True)
        part = {}
        for name, value in state.items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            part[name] = value if value.dim() < 2 else value.chunk(2, axis)[number].contiguous()
        torch.save(part, inner / "consolidated-00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"hidden_dim": WIDTH}))
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_files_of_one_name_in_two_folders(tmp_path: Path, number: int) -> None:
    model, out = split_meta(tmp_path / "model"), tmp_path / "out"
    index, plan = api.open_and_plan(model, TensorRTLLM())
    with index:
        names = [source.name for source in plan.sources]
        assert names == [f"consolidated.{part:02d}/consolidated-00.pth" for part in range(2)]
        before = journal.identity(plan, index.shards)
    flip(model / names[number], -(model / names[number]).stat().st_size // 2)
    index, plan = api.open_and_plan(model, TensorRTLLM())
    with index:
        told = journal.differences(before, journal.identity(plan, index.shards))
    assert len(told) == 1 and f"source file {names[number]} has another " in told[0]
    api.convert(model, out, TensorRTLLM(), Resources(memory_budget=4 << 30))


# ---- the hidden work


def cut_vocabulary(root: Path) -> tuple[Path, TensorRTLLM]:
    """A model whose vocabulary does not divide over the ranks, so that rows of padding follow it."""
    random = tiny.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        random[name] = random[name][:-3]
    return tiny.write(root, random, tiny.config(vocab_size=len(random["lm_head.weight"]))), TensorRTLLM(tp_size=2, quant="none")


def test_padding_is_written_again(tmp_path: Path) -> None:
    """Bytes that no tile covers: a flipped bit in them, and a file that is not of the output, do not come through a resume."""
    world = World(tmp_path / "world")
    world.model, world.options = cut_vocabulary(tmp_path / "model")
    world.reset({})
    world.run()
    world.right = snapshot(world.out)
    index, plan = api.open_and_plan(world.model, world.options)
    index.close()
    padded = [matrix for matrix in plan.matrices if matrix.filled < matrix.rows]
    assert padded
    world.reset()
    assert raised(world, 60)
    work = hidden(world.out, "partial")
    for matrix in padded:
        for place in matrix.places:
            with open(work / plan.files[matrix.file].name, "r+b") as file:
                file.seek(place.extent(0, matrix.rows)[1] - 1)
                file.write(b"\1")
    (work / "stray.safetensors").write_bytes(b"stray")
    (work / "folder").mkdir()
    (work / "folder" / "stray").write_bytes(b"stray")
    with pytest.raises(OutputError, match="is not of this run"):  # whose it is nobody knows: it is not removed
        world.run()
    assert (work / "folder" / "stray").read_bytes() == b"stray"
    shutil.rmtree(work / "folder")
    (work / "stray.safetensors").unlink()
    report = world.run()
    assert report.resumed > 0
    assert snapshot(world.out) == world.right


@pytest.mark.parametrize("every", [1, 7])
def test_any_changed_byte_of_the_work_is_mended(world: World, every: int) -> None:
    """Whatever byte of the hidden files it is: header, tensor, padding, or one that was never written."""
    assert raised(world, 110)
    for path in hidden(world.out, "partial").iterdir():
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), every):
            data[at] ^= 1 << (at % 8)
        path.write_bytes(data + b"more")
    world.run()
    assert snapshot(world.out) == world.right
