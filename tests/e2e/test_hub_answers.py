"""Hub: refusals, servers in trouble, redirects, content that changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from streamconv import api
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.e2e.hub_run import PARTS, content, hub, run
from tests.e2e.hub_server import REPO, SHA, Hub

__all__ = ["hub"]  # the fixture


@pytest.mark.parametrize(
    ("piece", "answer", "says"),
    [
        ("/api/models", (404, "RepoNotFound"), "no such model on the Hub"),
        ("/api/models", (401, "GatedRepo"), "hf auth login"),
        ("/api/models", (401, ""), "hf auth login"),
        ("/api/models", (403, ""), "hf auth login"),
        ("/api/models", (429, ""), "too many requests"),
        ("resolve/main/config.json", (403, "GatedRepo"), "is gated"),
        ("blobs/model-00001", (404, "EntryNotFound"), "is not on the Hub"),
        ("blobs/model-00001", (403, ""), "hf auth login"),
        ("blobs/model-00001", (429, ""), "too many requests"),
    ],
)
def test_refusals(hub: Hub, tmp_path: Path, piece: str, answer: tuple[int, str], says: str) -> None:
    hub.fail[piece] = answer
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 9, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr


@pytest.mark.parametrize(
    ("piece", "answer"),
    [("/api/models", (503, {})), ("blobs/model-00002", (429, {"Retry-After": "1"})), ("blobs/model-00002", (500, {}))],
)
def test_plan_tries_again(hub: Hub, tmp_path: Path, piece: str, answer: tuple[int, dict[str, str]]) -> None:
    hub.moods.append((piece, *answer))
    done = run(hub, tmp_path, "plan", REPO, "--json")
    assert done.returncode == 0 and not hub.moods, done.stderr


@pytest.mark.parametrize("answer", [(429, {"Retry-After": "1"}), (503, {})])
def test_download_tries_again(hub: Hub, tmp_path: Path, answer: tuple[int, dict[str, str]]) -> None:
    """Twice: the thread that fetches ahead may get one of the answers, and a worker the other."""
    hub.begun = lambda name: hub.moods.extend([("blobs/model-00003", *answer)] * 2) if "00002" in name else None
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 0 and not hub.moods, done.stderr
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM())
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_retry_after_is_obeyed(hub: Hub, tmp_path: Path) -> None:
    hub.moods.append(("/api/models", 429, {"Retry-After": "3"}))
    began = time.monotonic()
    assert run(hub, tmp_path, "inspect", REPO, "--json").returncode == 0
    assert time.monotonic() - began > 3


def test_long_retry_after_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.moods.append(("/api/models", 429, {"Retry-After": "600"}))
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 9 and "wait 600 s" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("piece", ["/api/models", "blobs/model-00001"])
def test_a_server_in_trouble(hub: Hub, tmp_path: Path, piece: str) -> None:
    hub.fail[piece] = (500, "")
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 9 and "status 500" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sum(piece in path for path in hub.asked) == 3


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "Bearer hf_secret" in hub.tokens["127.0.0.1"]
    assert hub.tokens["localhost"] == {""}, "the host that the redirect leads to got the token"


def test_content_that_changes_meanwhile(hub: Hub, tmp_path: Path) -> None:
    """Another content, and so another ETag, behind the same name and size: refused, and nothing published."""

    def begun(name: str) -> None:
        if "00001" in name:
            path = hub.folder / f"model-00003-of-{PARTS:05d}.safetensors"
            path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))

    hub.begun = begun
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 3 and "its content is not what the Hub lists" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
    hub.begun = lambda name: None
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 0, done.stderr
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM())
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_everything_is_asked_for_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    """A branch that moves during the run changes nothing."""
    assert run(hub, tmp_path, "convert", f"{REPO}@main", "out", "--quiet").returncode == 0
    files = [path for path in hub.asked if "/resolve/" in path and not path.endswith("config.json")]
    assert files and all(f"/resolve/{SHA}/" in path for path in files), files
