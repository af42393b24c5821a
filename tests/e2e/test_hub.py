"""Hub models against a real HTTP server on loopback: what is asked for, what is downloaded and kept, names, offline."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamconv import api
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.e2e.hub_run import PARTS, cached, content, hub, on_disk, run, weights
from tests.e2e.hub_server import REPO, Hub

__all__ = ["hub"]  # the fixture


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_headers_by_ranges(hub: Hub, tmp_path: Path, command: str) -> None:
    done = run(hub, tmp_path, command, f"hf://{REPO}@main", "--json")
    assert done.returncode == 0, done.stderr
    local = run(hub, tmp_path, command, str(hub.folder), "--json")
    here, there = json.loads(local.stdout), json.loads(done.stdout)
    if command == "plan":
        sizes = sorted((path.stat().st_size for path in hub.folder.glob("*.safetensors")), reverse=True)
        cache = there.pop("disk")["cache"]
        assert (cache["all"], cache["none"]) == (sum(sizes), sum(sizes[:2])) and cache["free"] > 0
        assert here.pop("disk")["cache"] is None
        memory = here.pop("memory"), there.pop("memory")  # holds what each process had in use, as measured
        assert memory[0]["tiles"] == memory[1]["tiles"]
    assert here == there
    assert not weights(hub.whole) and len(weights([name for name, _ in hub.ranges])) == PARTS
    assert all(size <= 65536 for name, size in hub.served.items() if name.endswith(".safetensors"))
    assert not cached(tmp_path)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_convert_equals_local(hub: Hub, tmp_path: Path, keep: str) -> None:
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM(tp_size=2))
    done = run(hub, tmp_path, "convert", REPO, "out", "--tp-size", "2", "--hub-keep", keep, STREAMCONV_TILE_ROWS="64")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert sorted(weights(hub.whole)) == sorted(path.name for path in hub.folder.glob("*.safetensors"))
    assert len(cached(tmp_path)) == (2 * PARTS if keep == "all" else 0)  # blobs, and links to them


def test_a_worker_downloads_the_shards_of_its_parts(hub: Hub, tmp_path: Path) -> None:
    """Two machines with caches of their own; `finalize` plans from the Hub again."""
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM(tp_size=2))
    fetched = []
    for part in ("0/3", "1/3", "2/3"):
        before = len(weights(hub.whole))
        more = {"HF_HOME": str(tmp_path / f"home{part[0]}"), "STREAMCONV_TILE_ROWS": "64"}
        done = run(hub, tmp_path, "convert", REPO, "out", "--tp-size", "2", "--part", part, "--no-lock", **more)
        assert done.returncode == 0, done.stderr
        fetched.append(len(weights(hub.whole)) - before)
    assert all(0 < count < PARTS for count in fetched), fetched
    done = run(hub, tmp_path, "finalize", "out", "--verify")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_several_outputs_download_each_shard_once(hub: Hub, tmp_path: Path) -> None:
    """The tensors are those of local runs; what is finished is not fetched again."""
    targets = {"one": TensorRTLLM(tp_size=2), "two": HuggingFace(quant="fp8_dynamic")}
    api.convert_all(hub.folder, [target.to(tmp_path / "local" / name) for name, target in targets.items()])
    command = ["convert", REPO, "--output", "trtllm:one:tp_size=2", "--output", "hf:two:quant=fp8_dynamic", "--hub-keep", "none"]
    for _ in range(2):
        done = run(hub, tmp_path, *command, STREAMCONV_TILE_ROWS="64")
        assert done.returncode == 0, done.stderr
        assert sorted(weights(hub.whole)) == sorted(path.name for path in hub.folder.glob("*.safetensors"))
    for path in (tmp_path / "local").rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(tmp_path / "local")).read_bytes() == path.read_bytes()
    assert not cached(tmp_path)


def test_cached_files_are_used_offline_and_kept(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", REPO, "one", "--quiet").returncode == 0
    asked, held = hub.gets, cached(tmp_path)
    done = run(hub, tmp_path, "convert", REPO, "two", "--hub-keep", "none", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.gets == asked and cached(tmp_path) == held
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_freed_shards_bound_the_cache(hub: Hub, tmp_path: Path, workers: str) -> None:
    """At every moment of the run the cache holds two shards at most: seen whenever one is asked for, and every few milliseconds."""
    held: list[int] = []
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.003):
            seen.append(on_disk(tmp_path / "home"))

    def begun(name: str) -> None:
        held.append(sum(path.parent.name == "blobs" for path in cached(tmp_path)))
        seen.append(on_disk(tmp_path / "home"))
        time.sleep(0.1)  # a slow line, so that the watch sees each state
        seen.append(on_disk(tmp_path / "home"))

    hub.begun = begun
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = run(hub, tmp_path, "convert", REPO, "out", "--hub-keep", "none", "--workers", workers)
    finally:
        over.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    assert len(held) > PARTS and max(held) <= 2, held  # config.json and the index file are whole too
    sizes = sorted((path.stat().st_size for path in hub.folder.glob("*.safetensors")), reverse=True)
    assert sizes[-1] < max(seen) <= sum(sizes[:2]) + (64 << 10), (max(seen), sizes)
    assert on_disk(tmp_path / "home") < 64 << 10


def test_truncated_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", REPO, "out").returncode == 0
    blob = next(path for path in cached(tmp_path) if path.parent.name == "blobs")
    os.truncate(blob, 1000)
    done = run(hub, tmp_path, "convert", REPO, "again")
    assert done.returncode == 9 and "truncated" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_cut_range_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[f"model-00002-of-{PARTS:05d}.safetensors"] = 100
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 0 and not hub.cuts, done.stderr


class Later(dict[str, int]):
    """Cuts the transfer of a whole file only, not the ranges before it."""

    hub: Hub

    def pop(self, key: Any, *rest: Any) -> Any:
        return super().pop(key, *rest) if key in self.hub.whole else None


def test_cut_download_is_resumed(hub: Hub, tmp_path: Path) -> None:
    for path in hub.folder.iterdir():
        path.unlink()
    vocab, big = 81920, tiny.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        big[name] = np.resize(big[name], (vocab, tiny.HIDDEN))
    tiny.write(hub.folder, big, tiny.config(vocab_size=vocab))
    hub.cuts = cuts = Later({"model.safetensors": 25 << 20})
    cuts.hub = hub
    done = run(hub, tmp_path, "convert", REPO, "out")
    assert done.returncode == 0 and not hub.cuts, done.stderr
    # the client writes 10 MiB at a time, so two of them were safe
    assert hub.whole.count("model.safetensors") == 1
    assert ("model.safetensors", f"bytes={20 << 20}-") in hub.ranges
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM())
    assert content(tmp_path / "out") == content(tmp_path / "local")


@pytest.mark.parametrize(
    ("model", "says"),
    [(f"{REPO}@v9", "no revision v9"), ("org/other", "no such model"), ("hf://nonsense", "not of the form")],
)
def test_names(hub: Hub, tmp_path: Path, model: str, says: str) -> None:
    done = run(hub, tmp_path, "inspect", model)
    assert done.returncode == 9 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_offline_without_cache(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "plan", REPO, HF_HUB_OFFLINE="1")
    assert done.returncode == 9 and "not in the cache" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert hub.gets == 0


def test_no_server(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "plan", REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 9 and "check the network" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_local_folder_wins(hub: Hub, tmp_path: Path) -> None:
    tiny.write(tmp_path / "org" / "tiny")
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 0 and hub.gets == 0, done.stderr
