"""Standard output that is full or that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

COMMANDS = {
    "inspect": ["streamconv", "inspect", "MODEL"],
    "inspect --json": ["streamconv", "inspect", "MODEL", "--json"],
    "plan": ["streamconv", "plan", "MODEL"],
    "convert --json": ["streamconv", "convert", "MODEL", "OUT", "--json"],
    "list": ["streamconv", "list", "quants"],
    "help": ["streamconv", "convert", "--help"],
    "nothing": ["streamconv"],
    "an error as JSON": ["streamconv", "inspect", "absent", "--json"],
    "official": ["streamconv.cli.convert_checkpoint", "--model_dir", "MODEL", "--output_dir", "OUT"],
    "official help": ["streamconv.cli.convert_checkpoint", "--help"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "model")


def _argv(command: list[str], model: Path, out: Path) -> list[str]:
    words = [{"MODEL": str(model), "OUT": str(out)}.get(word, word) for word in command[1:]]
    start = "from streamconv.cli.{} import run; run()".format("convert_checkpoint" if "checkpoint" in command[0] else "main")
    return [sys.executable, "-c", start, *words]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_device(name: str, model: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(_argv(COMMANDS[name], model, tmp_path / "out"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if "error" not in name])  # an error is told on standard error too
def test_a_closed_pipe_is_silent(name: str, model: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(_argv(COMMANDS[name], model, tmp_path / "out"), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    finally:
        os.close(writer)
    assert done.returncode == 1 and not done.stderr.strip(), (done.returncode, done.stderr)


def test_a_full_standard_error_stops_nothing(model: Path, tmp_path: Path) -> None:
    command = _argv(["streamconv", "convert", "MODEL", "OUT"], model, tmp_path / "out")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, timeout=100)
        assert done.returncode == 0 and "1 file" in done.stdout
        assert subprocess.run(command, stdout=subprocess.PIPE, stderr=full, timeout=100).returncode == 6  # the output is there already
    assert (tmp_path / "out" / "rank0.safetensors").exists()


def test_no_standard_output_at_all(model: Path, tmp_path: Path) -> None:
    words = " ".join(f"'{word}'" for word in _argv(COMMANDS["convert --json"], model, tmp_path / "out"))
    done = subprocess.run(["sh", "-c", f"{words} >&-"], stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
