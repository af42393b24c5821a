"""A conversion can be said in a file, and done again from what an earlier one left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamconv.cli.main import main
from tests import tiny

FLAGS = ["--tp-size", "2", "--quant", "int8", "--target-sm", "80", "--dtype", "bfloat16"]
FLAGS += ["--disable-weight-only-quant-plugin", "--use-parallel-embedding", "--target-version", "0.16"]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny.write(tmp_path / "model")


def test_a_written_recipe_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    assert main(["convert", "model", "first", *FLAGS, "-q"]) == 0
    assert main(["plan", "model", "second", *FLAGS, "--workers", "2", "--write-config", "r.toml", "--json"]) == 0
    text = (tmp_path / "r.toml").read_text()
    assert 'model = "model"' in text and 'workers = "2"' in text and "memory-budget" not in text
    assert main(["convert", "--config", "r.toml", "-q"]) == 0
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


@pytest.mark.parametrize("flags", [FLAGS, [], ["--pp-size", "2", "--kv-cache", "fp8", "--rope-tables"]], ids=["many", "none", "other"])
@pytest.mark.parametrize("config", ["first/streamconv.json", "first"])
def test_a_manifest_gives_the_same_bytes(model: Path, tmp_path: Path, flags: list[str], config: str) -> None:
    assert main(["convert", "model", "first", *flags, "-q"]) == 0
    assert main(["convert", "model", "second", "--config", config, "-q"]) == 0
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


def test_the_manifest_of_a_gemma_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that the family settles by itself are in the manifest as they were settled."""
    monkeypatch.chdir(tmp_path)
    settings = tiny.config(architectures=["GemmaForCausalLM"], model_type="gemma", head_dim=32, tie_word_embeddings=True)
    weights = {name: value for name, value in tiny.tensors().items() if name != "lm_head.weight"}
    tiny.write(tmp_path / "model", weights, settings)
    assert main(["convert", "model", "first", "--tp-size", "2", "-q"]) == 0
    assert main(["convert", "model", "second", "--config", "first/streamconv.json", "-q"]) == 0
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


def test_another_source_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "model", "first", "-q"]) == 0
    assert main(["convert", "model", "second", "--config", "first", "-q"]) == 0
    assert "warning" not in capsys.readouterr().err
    tiny.write(tmp_path / "other", None, tiny.config())
    os.rename(tmp_path / "other" / "model.safetensors", tmp_path / "other" / "renamed.safetensors")
    assert main(["convert", "other", "third", "--config", "first", "-q"]) == 0
    assert "third is not what first/streamconv.json tells of: the source is another one" in capsys.readouterr().err
    assert main(["convert", "model", "fourth", "--config", "first", "--tp-size", "2", "-q"]) == 0
    assert "other flags were given" in capsys.readouterr().err


def test_flags_win(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: absent\nout: elsewhere\ntp-size: 2\nkv_cache: fp8\n")
    assert main(["convert", "model", "out", "--config", "r.yaml", "--tp-size", "1", "-q"]) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["mapping"]["tp_size"] == 1 and made["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert not (tmp_path / "elsewhere").exists()


def test_plan_reads_one_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of convert alone do not disturb it."""
    (tmp_path / "r.toml").write_text('model = "model"\ntp-size = 2\nforce = true\nhub-keep = "none"\n')
    assert main(["plan", "--config", "r.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["tp_size"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("tp-sise = 2", "did you mean 'tp-size'?"), ("tp-size = '2'", "r.toml: tp-size is '2'"), ("tp-size = 2", "Missing argument 'MODEL'")],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(text)
    assert main(["convert", "--config", "r.toml"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["r.toml"]


def test_a_changed_manifest_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "model", "first", "-q"]) == 0
    path = tmp_path / "first" / "streamconv.json"
    path.write_text(path.read_text().replace('"tp_size": 1', '"tp_size": 2'))
    assert main(["convert", "model", "second", "--config", "first", "-q"]) == 2
    assert "hash mismatch" in capsys.readouterr().err
