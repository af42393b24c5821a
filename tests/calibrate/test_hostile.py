"""A model folder that wants more than to be read: code, kernels, questions, the network, and configs that mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from streamconv.calibration.run import calibrate
from streamconv.errors import StreamconvError
from tests.calibrate.test_streamed import model, text

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = ["--samples", "4", "--max-length", "16"]
NAMES = ("json", "numpy", "torch", "transformers", "sitecustomize", "usercustomize", "random", "tokenizers", "safetensors", "streamconv")


@pytest.fixture()
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def _change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | changes))


WAYS = [pytest.param("module", "place"), *(pytest.param(*way, marks=pytest.mark.slow) for way in (
    ("module", "copy"), ("command", "place"), ("command", "copy"), ("PYTHONPATH", "copy")
))]  # fmt: skip
"""How it is started, and the current folder: others' modules lie in the model's as well, whichever it is."""


@pytest.mark.parametrize(("how", "where"), WAYS)
def test_no_interpreter_imports_from_the_current_the_model_or_the_output_folder(
    how: str, where: str, copy: Path, text: Path, tmp_path: Path
) -> None:
    place, trace = tmp_path / "place", tmp_path / "ran"
    place.mkdir()
    for folder in (copy, place):
        for name in NAMES:
            (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write(__file__ + chr(10)); raise SystemExit(99)\n")
    start = {
        "command": ["-c", "import sys; sys.path.remove(''); from streamconv.__main__ import run; run()"],
        "module": ["-m", "streamconv"],
        "PYTHONPATH": ["-m", "streamconv"],
    }[how]
    words = ["convert", str(copy), str(place / "out"), "--quant", "smoothquant", "--text", str(text), *SIZES]
    here, env = {"copy": copy, "place": place}[where], dict(os.environ)
    if how == "PYTHONPATH":
        env["PYTHONPATH"] = f"{place}{os.pathsep}{copy}"
        # Python itself runs sitecustomize of PYTHONPATH before any program; and what is not in the current folder is the user's wish
        for folder in (copy, place):
            for name in NAMES:
                if folder != here or name in ("sitecustomize", "usercustomize", "streamconv"):
                    (folder / f"{name}.py").unlink(missing_ok=True)
    elif how == "module":
        (here / "streamconv.py").unlink()  # Python itself looks for what -m names in the current folder
    done = subprocess.run([sys.executable, *start, *words], cwd=here, env=env, capture_output=True, text=True, timeout=200)
    assert not trace.exists(), trace.read_text()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_a_kernel_of_the_hub_is_not_looked_for(key: str, copy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    calibrate(copy, tmp_path / "right.safetensors", str(text), samples=4, max_length=16)
    _change(copy, **{key: "org/kernel"})
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    calibrate(copy, tmp_path / "r.safetensors", str(text), samples=4, max_length=16)
    from safetensors.numpy import load_file

    right, made = (load_file(tmp_path / name) for name in ("right.safetensors", "r.safetensors"))
    assert all((right[name] == made[name]).all() for name in right)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_model_does_not_run_and_nobody_is_asked(file: str, copy: Path, text: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    _change(copy, file, auto_map=names, tokenizer_class="Evil")
    if file == "config.json":
        _change(copy, model_type="evil")
    command = [sys.executable, "-m", "streamconv", "calibrate", str(copy), "-o", str(tmp_path / "r"), "--text", str(text), *SIZES]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, timeout=100)
    assert not trace.exists() and "[y/N]" not in done.stdout + done.stderr
    assert done.returncode in (0, 3) and "Traceback" not in done.stderr, done.stderr


CONFIGS: dict[str, dict[str, Any]] = {
    "no model_type": {"model_type": None},
    "another model_type": {"model_type": "mamba"},
    "a list as model_type": {"model_type": ["llama"]},
    "an unknown activation": {"hidden_act": "\x1b[31mnone"},
    "activation of a wrong type": {"hidden_act": {"a": 1}},
    "too many layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "layers left": {"num_hidden_layers": 1},
    "a huge intermediate size": {"intermediate_size": 10**12},
    "a huge hidden size": {"hidden_size": 10**9},
    "a head size": {"head_dim": 10**6},
    "a head size of text": {"head_dim": "x"},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 3},
    "negative KV heads": {"num_key_value_heads": -1},
    "an unknown rope": {"rope_scaling": {"rope_type": "x", "factor": 2.0}},
    "a rope of nothing": {"rope_scaling": {"rope_type": "llama3"}},
    "rope as a list": {"rope_scaling": [1]},
    "rope theta null": {"rope_theta": None},
    "rope theta text": {"rope_theta": "x"},
    "rope theta zero": {"rope_theta": 0},
    "layer types": {"layer_types": ["x", "y"]},
    "layer types of a wrong type": {"layer_types": 7},
    "another dtype": {"torch_dtype": "float8"},
    "a dtype of a wrong type": {"torch_dtype": [1]},
    "epsilon text": {"rms_norm_eps": "x"},
    "epsilon huge": {"rms_norm_eps": 10**400},
    "dropout text": {"attention_dropout": "x"},
    "a method": {"to_dict": 3},
    "a class": {"__class__": "x"},
    "quantization": {"quantization_config": {"quant_method": "x\x1b]0;y"}},
    "quantization of a wrong type": {"quantization_config": 3},
    "per layer": {"per_layer_config": {"0": {"hidden_size": 7}}},
    "vocabulary": {"vocab_size": 10**15},
    "padding token": {"pad_token_id": 10**9},
    "positions": {"max_position_embeddings": "x"},
    "window": {"sliding_window": "x"},
    "biases": {"attention_bias": True},
    "an architecture that transformers lacks": {"architectures": ["InternLM2ForCausalLM"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_means_nothing_is_a_typed_error_or_none(name: str, copy: Path, text: Path, tmp_path: Path) -> None:
    _change(copy, **CONFIGS[name])
    place = tmp_path / "place"
    place.mkdir()
    try:
        calibrate(copy, place / "r.safetensors", str(text), samples=4, max_length=16)
    except StreamconvError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        assert not list(place.iterdir())
    else:
        assert [path.name for path in place.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[[["),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "TransfoXLTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"padding_side": "up", "model_max_length": "x"}'),
        ("tokenizer_config.json", "7"),
        ("special_tokens_map.json", '{"pad_token": 3}'),
    ],
)
def test_a_tokenizer_that_means_nothing_is_a_typed_error_or_none(file: str, content: str, copy: Path, text: Path, tmp_path: Path) -> None:
    (copy / file).write_text(content)
    place = tmp_path / "place"
    place.mkdir()
    try:
        calibrate(copy, place / "r.safetensors", str(text), samples=4, max_length=16)
    except StreamconvError as error:
        assert str(error).isprintable()
        assert not list(place.iterdir())
