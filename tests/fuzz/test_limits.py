"""The worst files known are refused in little memory, by a typed error of one short line; benchmarks/limits.py says in what time.

Some of them would take for ever: the timeout of a test is what says so here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamconv.checkpoint.dtypes import F16
from streamconv.checkpoint.limits import MAX_HEADER
from tests import tiny, warm
from tests.fuzz import hostile
from tests.headers import build_header

PEAK = 256 << 20
TIGHT = ("one escaped wide letter in 33 MB", "escaped wide names")
"""Cases that come so near to it that what a warm interpreter holds is too much."""


def read(kind: str, path: Path, *, anew: bool = False) -> dict[str, Any]:
    """What tests/fuzz/child.py says, and what the command said to the user.

    Args:
        anew: by a new interpreter; a warm one has more in memory to begin with.
    """
    words = ["-m", "tests.fuzz.child", kind, str(path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=250) if anew else warm.run(words)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"shown": done.stderr}


@pytest.mark.parametrize(("kind", "name", "make", "says"), hostile.CASES, ids=[f"{kind}: {name}" for kind, name, _, _ in hostile.CASES])
def test_refused_in_little_memory(kind: str, name: str, make: Callable[[], bytes], says: str, tmp_path: Path) -> None:
    path = hostile.write(tmp_path, kind, make)
    told = read(kind, path, anew=name in TIGHT)
    path.unlink()
    assert told["error"] in ("HeaderError", "CheckpointError", "TensorError")
    assert says in told["message"]
    assert len(told["message"]) < 1200 and "\n" not in told["message"]
    assert told["peak"] < PEAK and not told["torch"], told


def _weights(**changed: np.ndarray[Any, Any]) -> Callable[[Path], object]:
    return lambda model: tiny.write(model, tiny.tensors() | {name.replace("__", "."): array for name, array in changed.items()})


def _config(**changed: Any) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(json.dumps(tiny.config(**changed)))


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return apply


def _many(settings: dict[str, Any], entry: bytes) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        _config(**settings)(model)
        header = b"{" + b",".join(entry % number for number in range(hostile.MANY)) + b"}"
        (model / "model.safetensors").write_bytes(hostile.pack(header))

    return apply


_NORM = "model__norm__weight"
_EMPTY = b':{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
_NEARLY = b'"model.layers.%d.input_layernorm.weigh"' + _EMPTY
_MOE: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}

SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a name of 10,000 characters": (_weights(**{"a\n\x1b[31m" * 1250: np.zeros(3, np.float16)}), r"unexpected tensor a\n\x1b[31m"),
    "a tensor of no elements": (_weights(**{_NORM: np.zeros(0, np.float16)}), "model.norm.weight has shape [0], expected [128]"),
    "a tensor of no dimensions": (_weights(**{_NORM: np.zeros((), np.float16)}), "model.norm.weight has shape [], expected"),
    "weights are a FIFO": (_instead("model.safetensors", os.mkfifo), "is a FIFO"),
    "weights are a directory": (_instead("model.safetensors", Path.mkdir), "is a directory"),
    "weights are a device": (_instead("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "config is a device": (_instead("config.json", lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "weights link to themselves": (_instead("model.safetensors", lambda path: path.symlink_to(path.name)), "model.safetensors"),
    "a billion layers": (_config(num_hidden_layers=10**9), "1000000000 layers, but the source holds only 21 tensors"),
    "a billion experts": (_config(**_MOE, num_local_experts=10**9), "1000000000 experts in each of 2 layers"),
    "a billion heads": (_config(num_attention_heads=10**9), "not a multiple of num_attention_heads"),
    "a billion tokens": (_config(vocab_size=10**9), "model.embed_tokens.weight has shape [160, 128]"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_hostile_source_is_refused_in_a_line_for_each_problem(name: str, tmp_path: Path) -> None:
    spoil, says = SOURCES[name]
    model = tiny.write(tmp_path / "model")
    spoil(model)
    told = read("plan", model)
    assert told["status"] == 3 and told["error"] is None
    first, *problems = told["shown"].splitlines()
    assert says in told["shown"] and len(told["shown"]) < 1200
    assert not problems or first == f"error: {len(problems)} problems"
    assert all(line.isprintable() for line in (first, *problems))
    assert told["peak"] < PEAK and not told["torch"], told


WIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "as many layers": (_many({"num_hidden_layers": hostile.MANY}, b'"%d"' + _EMPTY), "and 981 more"),
    "names that are nearly right": (_many({"num_hidden_layers": 20_000}, _NEARLY), "and 981 more"),
    "as many experts": (_many(_MOE | {"num_local_experts": 120_000}, b'"%d"' + _EMPTY), "and 981 more"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(WIDE)])
def test_a_quarter_of_a_million_wrong_tensors_take_no_more_memory(name: str, tmp_path: Path) -> None:
    spoil, says = WIDE[name]
    model = tiny.write(tmp_path / "model")
    spoil(model)
    told = read("plan", model)
    assert told["status"] == 3 and says in told["shown"] and told["shown"].count("\n") == 22 and len(told["shown"]) < 5000
    assert told["peak"] < PEAK and not told["torch"], told


def test_200_000_tensors_in_one_file_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = [(f"model.layers.{n // 3000}.mlp.experts.{n // 3}.{n % 3}_proj.weight.{'x' * 40}", F16, (1, 1)) for n in range(200_000)]
    header, places = build_header(entries)
    assert 25_000_000 < len(header) < MAX_HEADER
    path.write_bytes(header)
    os.truncate(path, max(end for _, end in places.values()))
    told = read("header", path)
    assert told["error"] is None and told["peak"] < PEAK, told
