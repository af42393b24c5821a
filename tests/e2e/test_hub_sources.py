"""Hub: what a repository may hold, and the commands that read whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamconv import api
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.e2e.hub_run import PARTS, cached, content, hub, run, weights
from tests.e2e.hub_server import REPO, Hub

__all__ = ["hub"]  # the fixture


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
    api.convert(hub.folder, tmp_path / "local", TensorRTLLM(tp_size=2))
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
    offline = {"HF_HUB_OFFLINE": "1"} if downloaded else {}
    done = run(hub, tmp_path, "verify", "out", "--source", f"hf://{REPO}", "--json", **offline)
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


@pytest.mark.slow
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
