"""Hub models against a real HTTP server on loopback: what is asked for, what is downloaded, what errors say."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from streamconv import api
from streamconv.options import Options
from tests import tiny
from tests.e2e.hub_server import LARGE, REPO, SHA, Hub

ROOT = Path(__file__).resolve().parents[2]
PARTS = 4


def sharded(folder: Path) -> Path:
    """The tiny model in four shards, in the order of its layers."""
    folder.mkdir(parents=True)
    weights = tiny.tensors()
    names, parts = list(weights), {}
    for number in range(PARTS):
        chosen = names[number * len(names) // PARTS : (number + 1) * len(names) // PARTS]
        parts |= dict.fromkeys(chosen, file := f"model-{number + 1:05d}-of-{PARTS:05d}.safetensors")
        save_file({name: weights[name] for name in chosen}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    served = Hub(sharded(tmp_path / "remote"))
    yield served
    served.close()


def run(hub: Hub, tmp_path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process: huggingface_hub reads its variables once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "no_proxy": "*"}
    command = [sys.executable, "-m", "streamconv", *arguments]
    return subprocess.run(command, env=env | changes, capture_output=True, text=True, timeout=240, cwd=tmp_path)


def weights(names: Iterator[str] | list[str]) -> list[str]:
    return [name for name in names if name.endswith(LARGE)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def on_disk(folder: Path) -> int:
    """Bytes of all files in it, a link counted as none."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                told = os.lstat(os.path.join(place, name))
                found += told.st_size if stat.S_ISREG(told.st_mode) else 0
    return found


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 20_000]


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
    assert here == there
    assert not weights(hub.whole) and len(weights([name for name, _ in hub.ranges])) == PARTS
    assert all(size <= 65536 for name, size in hub.served.items() if name.endswith(".safetensors"))
    assert not cached(tmp_path)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_convert_equals_local(hub: Hub, tmp_path: Path, keep: str) -> None:
    api.convert(hub.folder, tmp_path / "local", Options(tp_size=2))
    done = run(hub, tmp_path, "convert", REPO, "out", "--tp-size", "2", "--hub-keep", keep, STREAMCONV_TILE_ROWS="64")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert sorted(weights(hub.whole)) == sorted(path.name for path in hub.folder.glob("*.safetensors"))
    assert len(cached(tmp_path)) == (2 * PARTS if keep == "all" else 0)  # blobs, and links to them


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
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.003):
            most = max(most, on_disk(tmp_path / "home"))

    def begun(name: str) -> None:
        held.append(sum(path.parent.name == "blobs" for path in cached(tmp_path)))
        time.sleep(0.1)  # a slow line, so that the watch sees each state

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
    assert sizes[1] < most <= sum(sizes[:2]) + (64 << 10), (most, sizes)
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
    api.convert(hub.folder, tmp_path / "local", Options())
    assert content(tmp_path / "out") == content(tmp_path / "local")


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


# ---- answers that pass


@pytest.mark.parametrize("answer", [(429, {"Retry-After": "1"}), (503, {}), (500, {})])
@pytest.mark.parametrize("piece", ["/api/models", "blobs/model-00002"])
def test_plan_tries_again(hub: Hub, tmp_path: Path, piece: str, answer: tuple[int, dict[str, str]]) -> None:
    hub.moods.append((piece, *answer))
    done = run(hub, tmp_path, "plan", REPO, "--json")
    assert done.returncode == 0 and not hub.moods, done.stderr


@pytest.mark.parametrize("answer", [(429, {"Retry-After": "1"}), (503, {})])
def test_download_tries_again(hub: Hub, tmp_path: Path, answer: tuple[int, dict[str, str]]) -> None:
    hub.begun = lambda name: hub.moods.append(("blobs/model-00003", *answer)) if "00002" in name and not hub.moods else None
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 0 and not hub.moods, done.stderr
    api.convert(hub.folder, tmp_path / "local", Options())
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_retry_after_is_obeyed(hub: Hub, tmp_path: Path) -> None:
    hub.moods.append(("/api/models", 429, {"Retry-After": "4"}))
    began = time.monotonic()
    assert run(hub, tmp_path, "inspect", REPO, "--json").returncode == 0
    assert time.monotonic() - began > 4


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


# ---- what is where


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
    assert done.returncode == 3 and "content has changed" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
    hub.begun = lambda name: None
    done = run(hub, tmp_path, "convert", REPO, "out", "--quiet")
    assert done.returncode == 0, done.stderr
    api.convert(hub.folder, tmp_path / "local", Options())
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_everything_is_asked_for_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    """A branch that moves during the run changes nothing."""
    assert run(hub, tmp_path, "convert", f"{REPO}@main", "out", "--quiet").returncode == 0
    files = [path for path in hub.asked if "/resolve/" in path and not path.endswith("config.json")]
    assert files and all(f"/resolve/{SHA}/" in path for path in files), files


def test_a_shard_that_is_not_in_the_repository(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / f"model-00002-of-{PARTS:05d}.safetensors").unlink()
    done = run(hub, tmp_path, "convert", REPO, "out")
    assert done.returncode != 0 and "missing file model-00002" in done.stderr and "upload complete" in done.stderr, done.stderr
    assert not weights(hub.whole)


def test_no_config(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "config.json").unlink()
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode != 0 and "missing config.json" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("parts", [1, 3])
def test_torch_files(hub: Hub, tmp_path: Path, parts: int) -> None:
    """pytorch_model*.bin: planned by ranges, converted to the same bytes as the folder."""
    for path in hub.folder.glob("model*"):
        path.unlink()
    held = {name: torch.from_numpy(value) for name, value in tiny.tensors().items()}
    listed: dict[str, str] = {}
    for number in range(parts):
        file = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        chosen = list(held)[number::parts]
        torch.save({name: held[name] for name in chosen}, hub.folder / file)
        listed |= dict.fromkeys(chosen, file)
    if parts > 1:
        (hub.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert run(hub, tmp_path, "plan", REPO).returncode == 0
    assert not weights(hub.whole) and not cached(tmp_path)
    there = sum(path.stat().st_size for path in hub.folder.glob("*.bin"))
    assert sum(size for name, size in hub.served.items() if name.endswith(".bin")) < there / 3
    done = run(hub, tmp_path, "convert", REPO, "out", "--tp-size", "2", "--hub-keep", "none")
    assert done.returncode == 0, done.stderr
    assert sorted(weights(hub.whole)) == sorted(path.name for path in hub.folder.glob("*.bin")) and not cached(tmp_path)
    api.convert(hub.folder, tmp_path / "local", Options(tp_size=2))
    assert content(tmp_path / "out") == content(tmp_path / "local")


@pytest.mark.parametrize("command", [["plan"], ["convert", "out"], ["inspect"]])
def test_meta_layout_is_refused_by_name(hub: Hub, tmp_path: Path, command: list[str]) -> None:
    for path in hub.folder.iterdir():
        path.unlink()
    (hub.folder / "params.json").write_text(json.dumps({"dim": 128, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}))
    torch.save({"norm.weight": torch.ones(128)}, hub.folder / "consolidated.00.pth")
    done = run(hub, tmp_path, command[0], REPO, *command[1:])
    assert done.returncode != 0 and "Meta's layout" in done.stderr and f"hf download {REPO}" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") == 0 and not weights(hub.whole)


# ---- commands that read the weights themselves


@pytest.mark.parametrize("downloaded", [True, False])
def test_verify_against_the_hub(hub: Hub, tmp_path: Path, downloaded: bool) -> None:
    keep = "all" if downloaded else "none"
    assert run(hub, tmp_path, "convert", REPO, "out", "--quiet", "--tp-size", "2", "--hub-keep", keep).returncode == 0
    before = len(weights(hub.whole))
    done = run(hub, tmp_path, "verify", "out", "--source", f"hf://{REPO}", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert not told["problems"] and told["errors"]
    assert len(weights(hub.whole)) - before == (0 if downloaded else PARTS)


def tokenizer(folder: Path) -> None:
    """A word tokenizer of eight words."""
    words = ["<unk>", "a", "small", "model", "reads", "some", "words", "."]
    vocab = {word: number for number, word in enumerate(words)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = parts | {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def test_calibrate_and_convert_with_text(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer(hub.folder)
    (tmp_path / "words.txt").write_text("a small model reads some words .\n" * 3)
    sizes = ["--text", "words.txt", "--samples", "2", "--max-length", "8"]
    done = run(hub, tmp_path, "calibrate", REPO, "-o", "ranges.safetensors", *sizes, "--device", "cpu", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(weights(hub.whole)) == PARTS
    flags = ["--quant", "smoothquant", "--quiet", "--device", "cpu"]
    done = run(hub, tmp_path, "convert", REPO, "one", *flags, *sizes)
    assert done.returncode == 0, done.stderr
    assert len(weights(hub.whole)) == PARTS, "downloaded again"
    done = run(hub, tmp_path, "convert", str(hub.folder), "two", *flags, "--activation-ranges", "ranges.safetensors")
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_text_reads_the_model_twice(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", REPO, "out", "--quant", "smoothquant", "--text", "words.txt", "--hub-keep", "none")
    assert done.returncode == 2 and "exclude each other" in done.stderr and done.stderr.count("\n") <= 2, done.stderr
    assert hub.gets == 0
