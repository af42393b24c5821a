"""The thread that fetches ahead and the workers that read and free files, in an order that is forced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamconv.hub import shard as hub_shard
from streamconv.hub.repo import Repo, RepoFile
from streamconv.hub.shard import HubShard


def test_a_file_that_was_read_and_freed_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may overtake the thread between its look and its download: nobody would remove what it brings."""
    brought: list[str] = []

    def download(_: Repo, file: RepoFile, shown: bool) -> Any:
        brought.append(file.name)
        path = tmp_path / file.name
        path.write_bytes(b"12345678")
        return path, None, path.stat()

    monkeypatch.setattr(hub_shard, "download", download)
    shard = HubShard(Repo("org/tiny", "0" * 40), RepoFile("model.safetensors", 8, ""), tmp_path)
    run: Any = type("Run", (), {"reached": lambda self, shard: None})()
    shard.fetch = run
    shard.download(ahead=True)
    assert brought == ["model.safetensors"]
    assert shard.fileno() >= 0 and brought == ["model.safetensors"]
    shard.free()
    (tmp_path / "model.safetensors").unlink()
    shard.download(ahead=True)
    assert brought == ["model.safetensors"]
    shard.fetch = run
    shard.download(ahead=True)
    assert len(brought) == 2
