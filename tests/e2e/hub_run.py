"""Running the command against the loopback Hub."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests import tiny, warm
from tests.e2e.hub_server import LARGE, Hub

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
    """The command in its own process."""
    return warm.run(["-m", "streamconv", *arguments], cwd=tmp_path, env=environment(hub, tmp_path) | changes)


def python(hub: Hub, tmp_path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter."""
    env = environment(hub, tmp_path) | changes
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=240, cwd=tmp_path)


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a command that knows only this Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "no_proxy": "*"}


def weights(names: Iterator[str] | list[str]) -> list[str]:
    return [name for name in names if name.endswith(LARGE)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def on_disk(folder: Path) -> int:
    """Bytes of all files in it, a link counted as none, and a file that is renamed meanwhile once."""
    return sum({told.st_ino: told.st_size for _, told in _files(folder, os.lstat) if stat.S_ISREG(told.st_mode)}.values())


def cached(tmp_path: Path) -> list[Path]:
    """Shards and links to them, also while a run brings and removes them."""
    return [path for path, told in _files(tmp_path / "home", os.stat) if told.st_size > 20_000]


def _files(folder: Path, look: Callable[[Path], os.stat_result]) -> Iterator[tuple[Path, os.stat_result]]:
    """What is below a folder that another process changes."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            try:
                told = look(path)
            except FileNotFoundError:
                continue
            yield path, told
