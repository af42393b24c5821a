"""File systems as people have them: mount points, no locks, no free space told, long names, passing errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv import api, mounts
from streamconv.checkpoint import shard as shards
from streamconv.cli.main import main
from streamconv.errors import OutputError, UnreadableError, UsageError
from streamconv.options import Resources
from streamconv.run.fs import Disk, free_space, hidden
from streamconv.run.output_folder import OutputFolder
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.crash.kills import operations, raised
from tests.crash.world import World, snapshot


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs at tmp_path/out."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("mounting takes more rights")
    yield out
    subprocess.run(["umount", "-l", str(out)], check=True)


def test_a_mount_point_is_worked_in(model: Path, tmp_path: Path, mounted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (mounted / "lost+found").mkdir()
    assert run("plan", model, mounted) == 0
    said = capfd.readouterr().out
    assert "is a mount point" in said
    assert "would refuse" not in said
    assert "in memory" in said
    assert run("convert", model, tmp_path / "beside", "--quiet") == 0
    assert run("convert", model, mounted, "--quiet") == 0
    shutil.rmtree(mounted / "lost+found")
    assert snapshot(mounted) == snapshot(tmp_path / "beside")
    assert run("convert", model, mounted, "--quiet") == 6
    assert run("convert", model, mounted, "--tp-size", 2, "--force", "--quiet") == 0
    assert sorted(os.listdir(mounted)) == ["config.json", "rank0.safetensors", "rank1.safetensors", "streamconv.json"]
    assert run("verify", mounted, "--quiet") == 0
    (mounted / "notes.txt").write_text("mine")
    assert run("convert", model, mounted, "--force", "--quiet") == 6
    assert (mounted / "notes.txt").read_text() == "mine"


def test_a_bind_mount_of_the_same_file_system_is_a_mount_point(model: Path, tmp_path: Path) -> None:
    out, behind = tmp_path / "o u t", tmp_path / "behind"
    out.mkdir()
    behind.mkdir()
    if subprocess.run(["mount", "--bind", str(behind), str(out)], capture_output=True).returncode:
        pytest.skip("mounting takes more rights")
    try:
        assert run("convert", model, out, "--quiet") == 0
        assert sorted(os.listdir(behind)) == ["config.json", "rank0.safetensors", "streamconv.json"]
    finally:
        subprocess.run(["umount", str(out)], check=True)


class Poor(Disk):
    """A file system without locks or without directory fsync."""

    def __init__(self, lacks: str) -> None:
        self.lacks = lacks

    def lock(self, fd: int) -> None:
        if self.lacks == "lock":
            raise OSError(errno.ENOSYS, "no")
        super().lock(fd)

    def sync(self, fd: int) -> None:
        if self.lacks == "sync" and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no")
        super().sync(fd)


@pytest.mark.parametrize("lacks", ["lock", "sync"])
def test_no_locks_are_refused_and_can_be_done_without(model: Path, tmp_path: Path, lacks: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="--no-lock"):
        api.convert(model, out, TensorRTLLM(), Resources(device="cpu"), disk=Poor(lacks))
    assert sorted(os.listdir(tmp_path)) == ["model"]
    api.convert(model, out, TensorRTLLM(), Resources(device="cpu", no_lock=True), disk=Poor(lacks))
    assert json.loads((out / "streamconv.json").read_text())["no_lock"] is True
    assert run("verify", out, "--quiet") == 0
    assert run("convert", model, tmp_path / "flag", "--no-lock", "--quiet") == 0
    assert snapshot(tmp_path / "flag") == snapshot(out)


def test_a_file_system_that_tells_of_no_space(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list(os.statvfs(tmp_path))
    told[2] = told[3] = told[4] = 0  # as ramfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(told))
    assert free_space(tmp_path) is None
    assert run("plan", model, tmp_path / "out") == 0
    assert run("convert", model, tmp_path / "out", "--quiet") == 0


@pytest.mark.parametrize("length", [120, 240, 255])
def test_long_names(model: Path, tmp_path: Path, length: int) -> None:
    name = "é" * (length // 2) + "x" * (length % 2)
    assert run("convert", model, tmp_path / name, "--quiet") == 0
    assert sorted(os.listdir(tmp_path)) == sorted([name, "model"])
    others = {hidden(tmp_path / (name[:-1] + end), "lock") for end in ("a", "b")}
    assert len(others) == 2


def test_names_that_are_none(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (["convert", model, ""], ["plan", model, ""], ["convert", model, "a\0b"]):
        assert run(*command) == 2
        assert "Traceback" not in capfd.readouterr().err
    assert run("convert", model, "x" * 300) == 6
    with pytest.raises(UsageError):
        api.convert(model, "", TensorRTLLM())
    assert os.listdir(".") == []


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "ENOMEM", "EACCES"])
def test_a_passing_read_error_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    world = World(tmp_path)
    preadv, calls = os.preadv, [0]

    def failing(fd: int, *args: object) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("model/model.safetensors") and args[1]:
            calls[0] += 1
            if calls[0] == 25:  # some are for what tells this file from others
                raise OSError(getattr(errno, code), "no")
        return preadv(fd, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards.os, "preadv", failing)
    with pytest.raises(UnreadableError, match="cannot be read at byte") as told:
        world.run()
    assert "is kept" in (told.value.hint or "")
    assert world.run().resumed > 5
    assert snapshot(world.out) == world.right


@pytest.mark.parametrize("what", ["unlinked", "cut", "cut and grown", "replaced"])
def test_a_hidden_file_that_changes_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    world = World(tmp_path)
    file, write, calls = hidden(world.out, "partial") / "rank0.safetensors", OutputFolder.write, [0]

    def meddled(self: OutputFolder, name: str, offset: int, data: bytes) -> None:
        calls[0] += 1
        if calls[0] == 15:
            if what in ("cut", "cut and grown"):
                os.truncate(file, 100)
            else:
                file.unlink()
            if what == "replaced":
                file.write_bytes(b"x")
        write(self, name, offset, data)

    monkeypatch.setattr(OutputFolder, "write", meddled)
    with pytest.raises(OutputError, match=r"rank0\.safetensors"):
        world.run()
    assert not world.out.exists()
    assert not world.finish()


def test_work_without_a_journal_is_nobodys(tmp_path: Path) -> None:
    world = World(tmp_path)
    last = operations(world)
    world.reset()
    assert raised(world, last - 20)
    hidden(world.out, "journal").unlink()
    before = snapshot(world.place)
    with pytest.raises(OutputError, match="without a journal"):
        world.run()
    hidden(world.out, "lock").touch()
    assert {name for name in before if "partial" in name} <= set(snapshot(world.place))


@pytest.mark.parametrize("name", [".out.streamconv-partial", ".out.streamconv-journal", ".out.streamconv-lock", ".out.streamconv-old"])
def test_hidden_names_are_part_of_the_place(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    model = tiny.write(tmp_path / name)
    before = snapshot(model)
    assert run("convert", model, tmp_path / "out", "--force") == 6
    assert "is where work for the output is kept" in capfd.readouterr().err
    shutil.move(model, tmp_path / "model")
    (tmp_path / name).symlink_to(tmp_path / "model")
    assert run("convert", tmp_path / "model", tmp_path / "out", "--force") == 6
    assert snapshot(tmp_path / "model") == before
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert run("convert", tmp_path / "model", tmp_path / "out", "--force") == 6
    assert "Traceback" not in capfd.readouterr().err


def test_a_nested_output_is_not_swept_away(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = OutputFolder.complete

    def late(self: OutputFolder, last: list[tuple[str, bytes]]) -> None:
        monkeypatch.setattr(OutputFolder, "complete", complete)
        complete(self, last)
        assert run("convert", model, tmp_path / "p" / "out" / "int8", "--quant", "int8", "--target-sm", "80", "--quiet") == 0

    monkeypatch.setattr(OutputFolder, "complete", late)
    with pytest.raises(OutputError, match="appeared while the run was at work") as told:
        api.convert(model, tmp_path / "p" / "out", TensorRTLLM(), Resources(device="cpu"))
    assert ".out.streamconv-partial" in (told.value.hint or "")
    assert run("verify", tmp_path / "p" / "out" / "int8", "--quiet") == 0
    os.rename(tmp_path / "p" / "out", tmp_path / "int8")
    assert run("convert", model, tmp_path / "p" / "out", "--quiet") == 0


def test_the_kernel_cache_is_private_whatever_the_umask(tmp_path: Path) -> None:
    code = "import os; os.umask(0); from streamconv.kernels import cache; print(cache.kernel_folder())"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()).stat().st_mode & 0o077 == 0


def test_mount_tables_are_read(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 - ext3 /dev/root rw\nbroken\n37 35 0:5 / /t rw - tmpfs tmpfs rw\n")
    assert mounts.mounted(table) == {Path("/a b"): "ext3", Path("/t"): "tmpfs"}
    assert mounts.mounted(tmp_path / "none") == {}


def test_ranges_do_not_go_into_the_model(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("some words\n")
    before = snapshot(model)
    (tmp_path / "link").symlink_to(model)
    for where in (model / "x.safetensors", tmp_path / "link" / "deep" / "x.safetensors"):
        assert run("calibrate", model, "-o", where, "--text", tmp_path / "text.txt") == 6
        assert "is in the model's folder" in capfd.readouterr().err
    assert run("calibrate", model, "-o", "", "--text", tmp_path / "text.txt") == 2
    assert snapshot(model) == before


def test_scratch_follows_no_link(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from streamconv.calibration.scratch import Scratch

    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "states-0").write_text("mine")
    hidden(tmp_path / "r.safetensors", "calibrate").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="not what a calibration"):
        Scratch(tmp_path / "r.safetensors", "mark", 4)
    assert os.listdir(tmp_path / "victim") == ["states-0"]
