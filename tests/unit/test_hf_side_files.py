"""What a quantized Hugging Face directory has beside its weights, and outputs that replace others."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from streamconv import api
from streamconv.errors import OutputError
from streamconv.open_plan import open_and_plan
from streamconv.targets.hf.card import NAME
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny

FP8 = HuggingFace(quant="fp8_dynamic")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_left_out_is_named_once(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    files = ("assets/notes.txt", "assets/more/deep.txt", "tokenizer.json", ".gitattributes", ".env", "code.py", "a.index.json", ".cache/x")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    os.mkfifo(source / "pipe")
    (source / "gone.txt").symlink_to("nowhere")
    report = api.convert(source, tmp_path / "out", FP8)
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", "streamconv.json", "tokenizer.json", "code.py", NAME}
    told = [line.partition("not copied (")[2] for line in report.warnings if "not copied" in line]
    assert [line.partition(": " if "no regular" not in line else "devices): ")[2] for line in told] == [
        "assets/more/deep.txt, assets/notes.txt", ".env", "gone.txt, pipe",
    ]  # fmt: skip
    _, plan = open_and_plan(source, FP8)
    assert [line for line in plan.warnings if "not copied" in line] == [line for line in report.warnings if "not copied" in line]
    assert verify(tmp_path / "out", source).problems == []


def test_large_files_are_left_out(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    with open(source / "video.mp4", "wb") as file:
        file.truncate(257 << 20)
    report = api.convert(source, tmp_path / "out", FP8)
    assert "video.mp4" not in names(tmp_path / "out") and any("video.mp4" in line for line in report.warnings)


def test_links_are_copied_by_content(tmp_path: Path) -> None:
    """As in the Hub's cache: a snapshot is a folder of links to blobs."""
    blobs = tiny.write(tmp_path / "models--org--tiny" / "blobs")
    (blobs / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    api.convert(snapshot, tmp_path / "out", FP8)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert "base_model: org/tiny\n" in (tmp_path / "out" / NAME).read_text()


def test_an_output_in_the_source_is_none_of_its_files(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    api.convert(source, source / "one", FP8)
    report = api.convert(source, source / "two", HuggingFace(quant="w4a16"))
    assert not any("not copied" in line for line in report.warnings)


@pytest.mark.parametrize("first", [HuggingFace(quant="fp8_dynamic", format="modelopt"), HuggingFace(quant="w4a16", max_shard_size=1 << 20)])
def test_force_replaces_an_output_with_other_files(tmp_path: Path, first: HuggingFace) -> None:
    weights = tiny.tensors()
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = weights["lm_head.weight"].repeat(40, 0)
    source = tiny.write(tmp_path / "source", weights, tiny.config(vocab_size=6400))
    (source / "added.txt").write_text("a file that is gone later")
    out = tmp_path / "out"
    api.convert(source, out, first)
    before = names(out)
    (source / "added.txt").unlink()
    with pytest.raises(OutputError, match="not empty"):
        api.convert(source, out, FP8)
    api.convert(source, out, FP8, force=True)
    assert before - names(out) >= {"added.txt"} and verify(out, source).problems == []


def test_force_keeps_what_no_manifest_lists(tmp_path: Path) -> None:
    source, out = tiny.write(tmp_path / "source"), tmp_path / "out"
    api.convert(source, out, FP8)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        api.convert(source, out, HuggingFace(quant="w4a16"), force=True)
    (out / "mine.txt").unlink()
    told = json.loads((out / "streamconv.json").read_bytes())
    told["side"]["mine.txt"] = [4, "0" * 32]
    (out / "mine.txt").write_text("mine")
    (out / "streamconv.json").write_text(json.dumps(told, indent=1))
    with pytest.raises(OutputError, match=r"mine\.txt"):  # a manifest that somebody changed tells of nothing
        api.convert(source, out, HuggingFace(quant="w4a16"), force=True)


def test_force_keeps_a_model_that_no_run_wrote(tmp_path: Path) -> None:
    """Its files have the names that an output's have."""
    source, other = tiny.write(tmp_path / "source"), tiny.write(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(OutputError, match="somebody's model"):
        api.convert(source, other, FP8, force=True)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


@pytest.mark.parametrize("name", ["tokenizer.json", NAME, "config.json"])
def test_force_destroys_no_edit(tmp_path: Path, name: str) -> None:
    """Also one that leaves the size as it is."""
    source, out = tiny.write(tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer.json").write_text('{"a": 1}')
    api.convert(source, out, FP8)
    data = (out / name).read_bytes()
    (out / name).write_bytes(data.replace(b"1", b"2", 1))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for again in (FP8, HuggingFace(quant="w4a16")):
        with pytest.raises(OutputError, match=rf"{re.escape(name)}, changed after") as caught:
            api.convert(source, out, again, force=True)
        assert "move what you want to keep" in (caught.value.hint or "")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / name).unlink()
    api.convert(source, out, FP8, force=True)
    assert (out / name).read_bytes() == data and verify(out, source).problems == []


def front(text: str) -> tuple[dict[str, object], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_keeps_what_the_source_says(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", settings=tiny.config(_name_or_path="org/tiny"))
    (source / NAME).write_text("---\nlicense: mit\ntags:\n- chat\nbase_model: org/root\n---\n# Tiny\n\n---\nIt is small.\n")
    api.convert(source, tmp_path / "out", HuggingFace(quant="w4a16", ignore=("*.down_proj",)))
    head, body = front((tmp_path / "out" / NAME).read_text())
    assert head == {
        "license": "mit", "tags": ["chat", "quantized", "w4a16", "compressed-tensors", "streamconv"],
        "base_model": "org/tiny", "base_model_relation": "quantized",
    }  # fmt: skip
    assert "| weights | w4a16 |" in body and "| `lm_head`, `model.layers.*.mlp.down_proj` (2) |" in body
    assert body.endswith("# Tiny\n\n---\nIt is small.\n")


@pytest.mark.parametrize(
    "text",
    ["", "no front matter\n",
     "---\n: [\n---\nbody\n", "---\na: &x [1]\nb: *x\n---\nbody\n", "---\n- list\n---\nbody\n", "---\nnever closed\n",
     "---\na: \"\\ud800\"\n---\nbody\n", "---\na: " + "[" * 5000 + "\n---\nbody\n", "---\na: " + "[" * 90 + "]" * 90 + "\n---\nbody\n"],
)  # fmt: skip
def test_odd_cards_stop_nothing(tmp_path: Path, text: str) -> None:
    source = tiny.write(tmp_path / "source")
    (source / NAME).write_text(text)
    api.convert(source, tmp_path / "out", FP8)
    head, body = front((tmp_path / "out" / NAME).read_text())
    assert "base_model" not in head and "fp8_dynamic" in head["tags"] and "| weights | fp8_dynamic |" in body  # type: ignore[operator]


def test_a_plain_copy_keeps_the_card(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    (source / NAME).write_bytes(b"\xff as it is")
    api.convert(source, tmp_path / "out", HuggingFace())
    assert (tmp_path / "out" / NAME).read_bytes() == b"\xff as it is"


def test_side_files_are_in_the_manifest(tmp_path: Path) -> None:
    source, out = tiny.write(tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    api.convert(source, out, FP8)
    (out / "tokenizer.json").write_text("[]")
    assert verify(out).problems == ["tokenizer.json: hash mismatch"]
    (out / "tokenizer.json").unlink()
    assert verify(out).problems == ["tokenizer.json is missing"]
