"""--force replaces checkpoints and nothing else, and no source is under what it replaces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamconv.cli.main import main
from tests import tiny


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The model as the Hub's cache keeps it: a folder of links into blobs/."""
    made = tiny.write(tmp_path / "made")
    repo = tmp_path / "hub" / "models--a--b"
    folder = repo / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        os.replace(path, repo / "blobs" / f"{number:040x}")
        (folder / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return folder


def test_links_lead_out_of_the_source(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blobs = snapshot.parents[1] / "blobs"
    before = content(blobs)
    for force in ([], ["--force"]):
        assert run("convert", snapshot, blobs, *force) == 6
        assert "holds 00000000000000000000" in capfd.readouterr().err
    assert run("convert", snapshot, snapshot.parents[1], "--force") == 6
    assert content(blobs) == before
    assert sorted(path.name for path in snapshot.parents[1].iterdir()) == ["blobs", "snapshots"]
    assert run("convert", snapshot, snapshot.parents[2] / "out", "--quiet") == 0


@pytest.mark.parametrize("entry", ["a.jpg", "model.safetensors", "rank0.safetensors/x", "rankx.safetensors", ".hidden"])
def test_force_spares_what_is_no_checkpoint(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], entry: str) -> None:
    out = tmp_path / "home"
    (out / entry).parent.mkdir(parents=True)
    (out / entry).write_text("mine")
    (out / "config.json").write_text("{}")
    before = content(out)
    for force in ([], ["--force"]):
        assert run("convert", model, out, *force) == 6
        said = capfd.readouterr().err
        assert "is no checkpoint folder: it holds" in said and entry.split("/")[0] in said
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_replaces_a_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", model, out, "--tp-size", 2, "--quiet") == 0
    assert run("convert", model, out, "--quiet") == 6
    assert run("convert", model, out, "--force", "--quiet") == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "rank0.safetensors", "streamconv.json"]


def test_a_ranges_file_inside_the_output(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ranges = out / "rank0.safetensors"  # what is called so is taken for a checkpoint's
    ranges.write_bytes(b"mine")
    arguments = ["--quant", "fp8", "--activation-ranges", ranges, "--force"]
    assert run("convert", model, out, *arguments) != 0
    assert ranges.read_bytes() == b"mine"
    capfd.readouterr()


def test_one_file_protects_itself_and_not_its_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert run("convert", "model.safetensors", "out", "--quiet") == 0
    assert json.loads(Path("out/config.json").read_text())["architecture"] == "LlamaForCausalLM"
    assert run("convert", "model.safetensors", ".", "--force") == 6
    assert run("convert", "model.safetensors", "..", "--force") == 6
    assert Path("model.safetensors").is_file()


def planned(capfd: pytest.CaptureFixture[str], *arguments: object) -> str | None:
    assert run("plan", *arguments) == 0
    text = capfd.readouterr().out
    assert run("plan", *arguments, "--json") == 0
    problem: str | None = json.loads(capfd.readouterr().out)["output_problem"]
    assert (problem is None) == ("convert would refuse this output" not in text)
    return problem


def test_plan_says_what_convert_would_refuse(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert planned(capfd, model, tmp_path / "free" / "deep") is None
    for out, said in (("model", "is the source"), ("full", "no checkpoint folder"), ("full/x", "not a folder"), (".", "holds the source")):
        assert said in (planned(capfd, model, tmp_path / out) or "")
        assert run("convert", model, tmp_path / out) == 6
        capfd.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]


def test_weights_that_are_not_used(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": dict.fromkeys(tiny.tensors(), "a.safetensors")}
    os.rename(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("convert", model, tmp_path / "one", "--quiet") == 0
    assert "not used" not in capfd.readouterr().err
    (model / "model.safetensors").write_bytes((model / "a.safetensors").read_bytes())
    assert run("convert", model, tmp_path / "two", "--quiet") == 0
    assert "a.safetensors and 1 more in the source is not used: model.safetensors is read" in capfd.readouterr().err
    os.rename(model / "model.safetensors", model / "b.safetensors")
    assert run("convert", model, tmp_path / "three", "--quiet") == 0
    assert "b.safetensors in the source is not used: the index file names 1 other file" in capfd.readouterr().err
