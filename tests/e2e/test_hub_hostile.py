"""A Hub that lies: whatever it sends becomes a path, a size, a hash or text only after a check; no byte counts without its hash."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamconv import api
from streamconv.hub import cache
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.e2e.hub_run import cached, content, hub, python, run
from tests.e2e.hub_server import REPO, SHA, Hub

__all__ = ["hub"]  # the fixture
SHARD = "model-00002-of-00004.safetensors"
READ = ("config.json", "model.safetensors.index.json", "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors")


def fails(done: subprocess.CompletedProcess[str], status: int, says: str) -> None:
    assert done.returncode == status and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable(), done.stderr


def works(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 0, done.stderr
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM())
    assert content(tmp_path / "out") == content(tmp_path / "local")


# ---- hashes


def spoiled(data: bytes) -> bytes:
    """Other bytes of the same length, valid where they are JSON."""
    if data[:1] == b"{":
        return data.replace(b": ", b":\t", 1)
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("keep", ["all", pytest.param("none", marks=pytest.mark.slow)])
def test_other_bytes_under_the_listed_etag(hub: Hub, tmp_path: Path, name: str, keep: str) -> None:
    """Refused by name, gone from the cache, and the next run is right."""
    hub.sent = lambda file, data, asked: spoiled(data) if file == name and asked is None else data
    fails(run(hub, tmp_path, "convert", REPO, "out", "--hub-keep", keep), 3, f"{name}: its content is not what the Hub lists")
    assert not (tmp_path / "out").exists()
    hub.sent = lambda file, data, asked: data
    works(hub, tmp_path)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("offline", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_other_bytes_in_the_cache(hub: Hub, tmp_path: Path, name: str, offline: str) -> None:
    """A former run, or another program, brought the file; one bit of it is another now."""
    assert run(hub, tmp_path, "convert", REPO, "one", "--quiet").returncode == 0
    found = next(path for path in (tmp_path / "home").rglob(name))
    held = found.resolve()
    held.write_bytes(spoiled(held.read_bytes()))
    done = run(hub, tmp_path, "convert", REPO, "two", HF_HUB_OFFLINE=offline)
    fails(done, 3, f"{name}: its content is not what the Hub lists")
    assert str(found) in done.stderr and held.exists() and not (tmp_path / "two").exists()


def test_the_plan_was_made_from_other_bytes(hub: Hub, tmp_path: Path) -> None:
    """Ranges give a header that the file does not hold: two equal tensors change places in it."""

    def sent(name: str, data: bytes, asked: str | None) -> bytes:
        if name != SHARD or asked is None:
            return data
        size = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + size])
        entries = [key for key in told if key != "__metadata__"]
        one, other = next((a, b) for a in entries for b in entries if a < b and told[a]["shape"] == told[b]["shape"])
        told[one], told[other] = told[other], told[one]
        made = json.dumps(told, separators=(",", ":")).encode().ljust(size)
        return data[:8] + made + data[8 + size :]

    hub.sent = sent
    fails(run(hub, tmp_path, "convert", REPO, "out"), 3, f"{SHARD} was served with other bytes while planning")
    assert not (tmp_path / "out").exists()


# ---- paths


def outside(tmp_path: Path) -> dict[str, bytes]:
    """Everything but the cache, the served files, and the work that a failed download leaves for a resume."""
    found = {}
    for place, folders, names in os.walk(tmp_path):
        folders[:] = [name for name in folders if name not in ("home", "remote") and not name.startswith(".out.")]
        found |= {os.path.join(place, name): Path(place, name).read_bytes() for name in names if not name.startswith(".out.")}
    return found


@pytest.mark.parametrize("name", ["config.json", SHARD])
@pytest.mark.parametrize("victim", ["{}/mine/file", "{}/mine/none", "../../../../mine/file", "..", "W//{}/mine/file"])
def test_an_etag_is_no_path(hub: Hub, tmp_path: Path, name: str, victim: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes((hub.folder / name).read_bytes())
    before = outside(tmp_path)
    hub.etags[name] = victim.format(tmp_path)
    fails(run(hub, tmp_path, "convert", REPO, "out", "--hub-keep", "none"), 9, "no plain name")
    assert outside(tmp_path) == before


def test_blobs_of_another_revision_stay(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", REPO, "one", "--quiet").returncode == 0
    snapshots = next((tmp_path / "home").rglob("snapshots"))
    (snapshots / SHA).rename(snapshots / ("f" * 40))
    done = run(hub, tmp_path, "convert", REPO, "two", "--quiet", "--hub-keep", "none")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "two")
    links = list((snapshots / ("f" * 40)).iterdir())
    assert len(links) == 6 and all(path.read_bytes() == (hub.folder / path.name).read_bytes() for path in links)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A file of a cache, as a link to a blob that was just downloaded."""
    (tmp_path / "repo" / "blobs").mkdir(parents=True)
    (tmp_path / "repo" / "blobs" / "abc").write_bytes(b"weights")
    path = tmp_path / "repo" / "snapshots" / SHA / "file"
    path.parent.mkdir(parents=True)
    path.symlink_to("../../blobs/abc")
    return path


def _link(path: Path) -> None:
    other = path.parent.parent / ("e" * 40) / "deep" / "file"
    other.parent.mkdir(parents=True)
    other.symlink_to(path.resolve())


def _hard(path: Path) -> None:
    os.link(path.resolve(), path.parent.parent.parent / "mine")


def _replaced(path: Path) -> None:
    blob = path.resolve()
    blob.with_name("new").write_bytes(b"another")
    os.replace(blob.with_name("new"), blob)


@pytest.mark.parametrize("change", [_link, _hard, _replaced])
def test_only_what_was_brought_is_removed(snapshot: Path, change: Callable[[Path], None]) -> None:
    ours = cache.brought(snapshot, set())
    assert ours is not None
    change(snapshot)
    cache.remove(snapshot, ours)
    assert snapshot.exists()


def test_what_was_brought_is_removed(snapshot: Path) -> None:
    assert cache.brought(snapshot, {"abc"}) is None
    ours, blob = cache.brought(snapshot, set()), snapshot.resolve()
    assert ours is not None
    cache.remove(snapshot, ours)
    assert not os.path.lexists(snapshot) and not blob.exists()


@pytest.mark.parametrize("to", ["../../../mine", "/etc/hostname", "../../blobs/../../mine", "../../blobs/link", "../../blobs/none"])
def test_nothing_outside_of_the_cache_was_brought(snapshot: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "repo" / "blobs" / "link").symlink_to(tmp_path / "mine")
    snapshot.unlink()
    snapshot.symlink_to(to)
    assert cache.brought(snapshot, set()) is None


# ---- sizes


def zipped(times: int, data: bytes) -> bytes:
    for _ in range(times):
        data = gzip.compress(data, 9)
    return data


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br", "zstd"])
def test_a_listing_that_unpacks_to_too_much(hub: Hub, tmp_path: Path, encoding: str) -> None:
    bomb = zipped(encoding.count("gzip"), bytes(64 << 20))
    hub.listing = lambda info: (bomb, {"Content-Encoding": encoding})
    fails(run(hub, tmp_path, "plan", REPO), 9, "more than was asked for" if encoding == "gzip" else "encoding that is not accepted")


def test_a_listing_of_a_zipped_answer(hub: Hub, tmp_path: Path) -> None:
    hub.listing = lambda info: (zipped(1, json.dumps(info).encode()), {"Content-Encoding": "gzip"})
    works(hub, tmp_path)


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_file_that_does_not_end(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.sent = lambda file, data, asked: data + bytes(12 << 20) if file == name and asked is None else data
    fails(run(hub, tmp_path, "convert", REPO, "out"), 9, "")
    assert not any(path.stat().st_size > 9 << 20 for path in cached(tmp_path))


def test_very_many_files(hub: Hub, tmp_path: Path) -> None:
    more = [{"rfilename": f"more-{number}.bin", "size": 1, "blobId": "0" * 40} for number in range(20_000)]
    hub.listing = lambda info: (json.dumps(info | {"siblings": info["siblings"] + more}).encode(), {})
    works(hub, tmp_path)


# ---- everything else that an answer says

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 1 << 70, "", "..", "../../../../mine/file", "/etc/passwd", "\x1b]0;title\x07", "\u202eflip"),
    *("a\x00b", "\ud800", "n" * 5000, "0" * 40, "f" * 64, [], {"a": []}, "C:\\x", "con\r\nfig", "model.safetensors"),
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything stands in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    if isinstance(value, list):
        for number in range(min(len(value), 2)):
            yield from leaves(value[number], (*path, number))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is leaves:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


PROGRAM = """
import contextlib, io, json, os, shutil, sys
from streamconv.cli.main import main
for number in range(int(sys.argv[1])):
    told = io.StringIO()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            status = main(sys.argv[2:])
    except BaseException as error:
        status = repr(error)
    print(json.dumps([status, told.getvalue()]), flush=True)
"""


def many(hub: Hub, tmp_path: Path, count: int, *arguments: str) -> list[tuple[Any, str]]:
    """The command `count` times in one process: (status or exception, output)."""
    done = python(hub, tmp_path, "-c", PROGRAM, str(count), *arguments)
    assert done.returncode == 0 and done.stderr.replace("\n", "").isprintable(), done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_value_of_the_listing(hub: Hub, tmp_path: Path) -> None:
    """Each place of the listing, also one that is added some day, with each of these values, and left out."""
    told: list[dict[str, Any]] = []
    hub.listing = lambda info: told.append(info) or (b"{}", {})  # type: ignore[func-returns-value]
    many(hub, tmp_path, 1, "plan", REPO)
    (tmp_path / "mine").mkdir()
    before = outside(tmp_path)
    aside = ("id", "modelId", "private", "tags", "downloads")  # never read: every fifth value is enough
    cases = []
    for path in leaves(told[0]):
        own = type(functools.reduce(lambda inner, key: inner[key], path, told[0]))
        few = VALUES[::4]  # of other types than its own; of that, all
        cases += [(path, value) for value in VALUES if value in few or (type(value) is own and path[:1] and path[0] not in aside)]
    cases += [(path, leaves) for path in leaves(told[0]) if path]
    turn = iter(cases)

    def listing(info: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        return json.dumps(changed(info, *next(turn))).encode(), {}

    hub.listing = listing
    found = many(hub, tmp_path, len(cases), "plan", REPO)
    assert len(found) == len(cases) > 200
    for (path, value), (status, text) in zip(cases, found, strict=True):
        assert status in (0, 3, 9), (path, value, status)
        assert text.replace("\n", "").isprintable() and (status == 0 or text.startswith("error: ")), (path, value, text)
    assert outside(tmp_path) == before


TEXTS = (
    *("", "x", "../../../../mine/file", "/etc/passwd", "\x1b]0;title\x07", "a\x07", "n" * 4000),
    *("-1", "9" * 30, "0" * 40, '"', "W/", "\xff", "%2e%2e/x"),
)
HEADERS = (
    *("X-Repo-Commit", "ETag", "X-Linked-Etag", "X-Linked-Size", "Content-Disposition", "X-HF-Warning", "Content-Type"),
    *("X-Error-Message", "X-Xet-Hash", "Link", "Content-Encoding", "X-Something-New"),
)
ASIDE = ("Content-Disposition", "Content-Type", "Link", "X-Something-New")
"""Never read: every third text is enough."""


def test_every_header_of_a_file(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    before = outside(tmp_path)
    cases = [(name, value) for name in HEADERS for value in TEXTS[:: 3 if name in ASIDE else 1]]
    turn = iter(cases)

    def listing(info: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        hub.headers = dict([next(turn)])
        return json.dumps(info).encode(), {}

    hub.listing = listing
    found = many(hub, tmp_path, len(cases), "plan", REPO)
    assert len(found) == len(cases)
    for (name, value), (status, text) in zip(cases, found, strict=True):
        assert status in ((9,) if "\x07" in value else (0, 3, 9)), (name, value, status, text)
        assert text.replace("\n", "").isprintable() and (status == 0 or "error: " in text), (name, value, text)
    assert outside(tmp_path) == before
