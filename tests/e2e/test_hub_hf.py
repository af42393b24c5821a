"""A model of the Hub becomes a quantized Hugging Face directory: its side files come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.hub_run import content, hub, run, weights
from tests.e2e.hub_server import REPO, Hub

__all__ = ["hub"]  # the fixture

AS_HF = ("--to", "hf", "--quant", "fp8_dynamic")


def with_nested(info: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    nested = {"rfilename": "assets/notes.txt", "size": 3, "blobId": "0" * 40}
    return json.dumps(info | {"siblings": [*info["siblings"], nested]}).encode(), {}


def test_side_files_come_from_the_listing(hub: Hub, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "pytorch_model.bin"):
        (hub.folder / name).write_text(name)
    (hub.folder / "README.md").write_text("---\nlicense: mit\n---\nText.\n")
    hub.listing = with_nested
    plan = run(hub, tmp_path, "plan", REPO, *AS_HF, "--json")
    assert plan.returncode == 0, plan.stderr
    told = json.loads(plan.stdout)
    assert [line for line in told["warnings"] if "assets/notes.txt" in line]
    assert not weights(hub.whole) and not {"tokenizer.json", "vocab.txt"} & {*hub.whole}
    done = run(hub, tmp_path, "convert", REPO, "out", *AS_HF, "--quiet")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == "tokenizer.json" and (out / "vocab.txt").read_text() == "vocab.txt"
    assert not (out / "pytorch_model.bin").exists()
    card = (out / "README.md").read_text()
    assert card.startswith(f"---\nlicense: mit\nbase_model: {REPO}\nbase_model_relation: quantized\n") and card.endswith("Text.\n")
    again = run(hub, tmp_path, "convert", REPO, "again", *AS_HF, "--quiet", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert content(out) == content(tmp_path / "again")
    assert run(hub, tmp_path, "verify", "out", "--source", REPO).returncode == 0


def test_a_side_file_with_other_bytes_is_refused(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "tokenizer.json").write_text("right")
    hub.sent = lambda name, data, asked: b"wrong" if name == "tokenizer.json" else data
    done = run(hub, tmp_path, "convert", REPO, "out", *AS_HF)
    assert done.returncode == 3 and "tokenizer.json" in done.stderr and not (tmp_path / "out").exists(), done.stderr


def test_a_quantized_source_is_fetched_in_order(hub: Hub, tmp_path: Path) -> None:
    """Codes and scales count as what a tile needs: each shard is freed after its last row."""
    made = run(hub, tmp_path, "convert", str(hub.folder), "remote2", *AS_HF, "--quiet")
    assert made.returncode == 0, made.stderr
    for path in hub.folder.iterdir():
        path.unlink()
    for path in (tmp_path / "remote2").iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    done = run(hub, tmp_path, "convert", REPO, "out", "--to", "hf", "--hub-keep", "none", "--quiet")
    assert done.returncode == 0, done.stderr
    local = run(hub, tmp_path, "convert", str(hub.folder), "local", "--to", "hf", "--quiet")
    assert local.returncode == 0 and content(tmp_path / "out") == content(tmp_path / "local"), local.stderr
    assert not [path for path in (tmp_path / "home").rglob("*.safetensors")]
    changed = max(hub.folder.glob("*.safetensors"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x55")
    refused = run(hub, tmp_path, "convert", REPO, "bad", "--to", "hf", "--hub-keep", "none", "--quiet")
    assert refused.returncode == 3 and f"{changed.name}: " in refused.stderr and "streamconv.json" in refused.stderr, refused.stderr
    assert not (tmp_path / "bad").exists()
