"""`streamconv bench`: conversions beside cp and a command of the user's, measured the same way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from streamconv.bench import command, model, run
from streamconv.cli.main import main

EATER = """{} -S -c "import os, shutil, time; held = bytearray(200 << 20); shutil.copytree('{{model}}', '{{out}}')
while not os.path.exists('{}'): time.sleep(0.01)
os.unlink('{}')" """
"""It holds what it took until that was seen, in every round."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own rates are not measured."""
    monkeypatch.setattr(run, "disk_rates", lambda *_: {"read": 1e9, "write": None})
    monkeypatch.setattr(run, "kernel_rate", lambda _: 1e9)


def test_a_conversion_beside_a_command_of_the_users_and_one_that_fails(
    tmp_path_factory: pytest.TempPathFactory, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path, seen, resident = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("eater") / "seen", command._resident
    page = tmp_path / "page.html"
    eater = EATER.format(sys.executable, seen, seen).strip()

    def looked(pid: int) -> int:
        if (size := resident(pid)) >= 200 << 20:
            seen.touch()
        return size

    monkeypatch.setattr(command, "_resident", looked)
    flags = ["--runs", "1", "--budget", "300MiB", "--quant", "none", "--work", str(tmp_path), "--report", str(page), "--json"]
    assert main(["bench", "--shape", "llama-tiny", *flags, "--against", eater, "--against", "false {model} {out}", "--warm"]) == 8
    told = json.loads(capsys.readouterr().out)
    ours, theirs, failing = told["jobs"]
    assert ours["limit"] == 300 << 20 and 30 << 20 < ours["peak"] <= 300 << 20 and told["cache"] == "warm"
    assert 200 << 20 <= theirs["peak"] < 300 << 20 and theirs["name"] == eater
    assert all(job["status"] == 0 and len(job["seconds"]) == 1 and job["ratio"] > 0 for job in (ours, theirs))
    assert failing["status"] == 1 and failing["ratio"] is None
    beside = {each["name"]: each for each in ours["against"]}
    assert beside[eater]["faster"] == pytest.approx(theirs["seconds"][0] / ours["seconds"][0])
    assert beside[eater]["memory"] == pytest.approx(ours["peak"] / theirs["peak"])
    assert beside["false {model} {out}"] == {"name": "false {model} {out}", "faster": None, "memory": None}
    assert "Benchmark of llama-tiny" in page.read_text() and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_rates_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    rates = run.disk_rates(tmp_path / "file", tmp_path)
    assert all(rate is not None and rate > 1e6 for rate in rates.values()) and run.kernel_rate("int8", 0.05) > 1e6
    assert run.disk_rates(tmp_path / "missing", tmp_path / "missing") == {"read": None, "write": None}


def test_without_root_systemd_makes_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for systemd-run: the command runs under it, with the limit; where it refuses, without any."""
    stub = tmp_path / "systemd-run"
    told = tmp_path / "told"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {told}\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(command, "_made", lambda limit: None)
    with command.group(64 << 20) as place:
        found = command.measured(["sh", "-c", "echo words; exit 3"], tmp_path / "log", place)
    asked = "--user --scope --quiet --collect -p MemoryMax=67108864 -p MemorySwapMax=0 -- "
    assert place and told.read_text().splitlines() == [f"{asked}true", f"{asked}sh -c echo words; exit 3"]
    assert found.status == 3 and found.error == "words\n" and found.cgroup_peak is None  # the stand-in left it in our cgroup
    stub.write_text("#!/bin/sh\nexit 1\n")
    with command.group(None) as place:
        assert not place


@pytest.mark.parametrize(
    "words",
    [["bench"], ["bench", "m", "--shape", "llama-1b"], ["bench", "--shape", "x"], ["bench", "--shape", "llama-tiny", "--against", "true"]],
)
def test_what_cannot_be_measured(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--work", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shape_is_a_whole_model(tmp_path: Path) -> None:
    model.write(tmp_path / "m", "llama-tiny")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as held:
        names = held.keys()
        assert {name: tuple(held.get_slice(name).get_shape()) for name in names} == dict(model.tensors(model.SHAPES["llama-tiny"]))
        assert float(held.get_tensor("model.norm.weight").float().min()) == 1.0
        assert 0.01 < float(held.get_tensor("lm_head.weight").float().std()) < 0.03


@pytest.mark.slow
def test_a_command_that_takes_more_than_its_cgroup_is_killed(tmp_path: Path) -> None:
    with command.group(64 << 20) as place:
        if place.folder is None:
            pytest.skip("no memory cgroup can be made here")
        found = command.measured([sys.executable, "-c", "bytearray(200 << 20)"], tmp_path / "log", place)
    assert found.status == -9 and not place.folder.exists()
