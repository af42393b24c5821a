"""`streamconv bench`: conversions beside cp and a command of the user's, measured the same way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from streamconv.bench import command, model
from streamconv.cli.main import main

EATER = f"{sys.executable} -c \"import sys, shutil; held = bytearray(200 << 20); shutil.copytree('{{model}}', '{{out}}')\""


def test_a_conversion_and_a_command_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    flags = ["--runs", "1", "--budget", "300MiB", "--work", str(tmp_path), "--report", str(page), "--json"]
    assert main(["bench", "--shape", "llama-tiny", *flags, "--against", EATER]) == 0
    told = json.loads(capsys.readouterr().out)
    ours, theirs = told["jobs"]
    assert ours["limit"] == 300 << 20 and 40 << 20 < ours["peak"] <= 300 << 20
    assert 200 << 20 <= theirs["peak"] < 300 << 20 and theirs["name"] == EATER
    assert all(job["status"] == 0 and len(job["seconds"]) == 1 and job["ratio"] > 0 for job in told["jobs"])
    assert told["rates"]["encode int8"] > 0 and "Benchmark of llama-tiny" in page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_command_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runs", "1", "--quant", "nonsense", "--work", str(tmp_path)]
    assert main(["bench", "--shape", "llama-tiny", *flags]) == 8
    shown = capsys.readouterr().out
    assert "failed with status 2" in shown and "nonsense" in shown


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
        if place is None:
            pytest.skip("no memory cgroup can be made here")
        found = command.measured([sys.executable, "-c", "bytearray(200 << 20)"], tmp_path / "log", place)
    assert found.status == -9 and not place.exists()
