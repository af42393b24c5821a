"""Files that decide an output beside its source, edited by hand, exchanged, or changed while they are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamconv import api
from streamconv.checkpoint.codes_file import mark_of
from streamconv.errors import DataError, ResumeError, SourceChangedError, TensorError
from streamconv.hub import open_source
from streamconv.options import Resources
from streamconv.progress import Meter, Progress
from streamconv.targets.base import Target
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny
from tests.unit.test_hf_ranges import ranges_of

Arrays = dict[str, "np.ndarray[Any, Any]"]
GROUP = 64
UP = "model.layers.1.mlp.up_proj"


def codes_of(weights: Arrays) -> Arrays:
    """Rounded to nearest, as a search would store them."""
    made: Arrays = {}
    for name, weight in weights.items():
        if "_proj" in name:
            groups = weight.astype(np.float32).reshape(len(weight), -1, GROUP)
            scale = (np.abs(groups).max(2) / 7).astype(np.float16).astype(np.float32)
            codes = np.clip(np.round(groups / scale[..., None]), -8, 7).astype(np.int8).reshape(weight.shape).view(np.uint8) & 15
            module = name.removesuffix(".weight")
            made |= {name: codes[0::2] | codes[1::2] << 4, f"{module}.weight_scale": scale, f"{module}.losses": np.ones(3, np.float32)}
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model")


@pytest.fixture
def codes(model: Path, tmp_path: Path) -> Path:
    with open_source(model) as index:
        mark = mark_of(index, [name.removesuffix(".weight") for name in codes_of(tiny.tensors()) if name.endswith(".weight")])
    return write(tmp_path / "codes.safetensors", codes_of(tiny.tensors()), weights=mark)


def write(path: Path, tensors: Arrays, **told: Any) -> Path:
    save_file(tensors, path, metadata={"calibration": json.dumps({"method": "clip"} | told)})
    return path


def targets(path: Path) -> list[Target]:
    given: dict[str, Any] = {"group_size": GROUP, "method": "clip", "codes": str(path)}
    return [*(HuggingFace(quant="w4a16", format=form, **given) for form in ("compressed-tensors", "awq", "modelopt")),
            TensorRTLLM(quant="int4_awq", **given)]  # fmt: skip


def convert(model: Path, target: Target, out: Path, at: float = 2.0, act: Callable[[], object] = lambda: None) -> None:
    """Calls `act` once that much of it is done."""

    def watch(now: Progress) -> None:
        nonlocal at
        if now.total and now.done > at * now.total:
            at = 2.0
            act()

    api.convert(model, out, target, Resources(workers=1, tile_rows=16), meter=Meter(watch, every=0))


def test_codes_as_they_were_found(model: Path, codes: Path, tmp_path: Path) -> None:
    for number, target in enumerate(targets(codes)):
        convert(model, target, tmp_path / str(number))
        assert verify(tmp_path / str(number), model).problems == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0, 1e-30, 1e30])
def test_scales_that_are_none(value: float, model: Path, codes: Path, tmp_path: Path) -> None:
    held = load_file(codes)
    held[f"{UP}.weight_scale"][3, 1] = value
    write(codes, held)
    for target in targets(codes)[: 2 if 0 < value < np.inf else 4]:  # the others hold 1e30 in float32
        with pytest.raises(DataError, match=rf"{UP}\.weight_scale holds .* no scale"):
            convert(model, target, tmp_path / "out")


EDITS: dict[str, tuple[Arrays, dict[str, Any], str]] = {
    "a weight of the source": ({"model.embed_tokens.weight": np.zeros((160, 128), np.float16)}, {}, "none of a linear layer's codes"),
    "a weight as if it were folded": ({"lm_head.weight": np.zeros((160, 128), np.float16)}, {"folded": "all"}, "neither a norm nor"),
    "pre-scales where none are": ({f"{UP}.pre_quant_scale": np.ones(128, np.float32)}, {}, "has no place for it"),
    "pre-scales of another type": ({f"{UP}.pre_quant_scale": np.ones(128, np.float16)}, {}, "inputs mean F32"),
    "folds that are unknown": ({}, {"folded": ["all"]}, "where pre-scales are"),
    "codes of other weights": ({}, {"weights": "0" * 32}, "found for other weights"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_no_search_writes(edit: str, model: Path, codes: Path, tmp_path: Path) -> None:
    more, told, says = EDITS[edit]
    write(codes, load_file(codes) | more, **told)
    with pytest.raises(TensorError, match=says):
        api.open_and_plan(model, targets(codes)[0])


def test_codes_go_with_weights_and_not_with_files(model: Path, codes: Path, tmp_path: Path) -> None:
    weights = tiny.tensors()
    other = tiny.write(tmp_path / "other", weights | {f"{UP}.weight": -weights[f"{UP}.weight"]})
    for target in targets(codes):
        with pytest.raises(TensorError, match="found for other weights"):
            api.open_and_plan(other, target)
    names = sorted(weights)
    for number in range(2):
        save_file({name: weights[name] for name in names[number::2]}, model / f"model-0000{number + 1}-of-00002.safetensors")
    (model / "model.safetensors").unlink()
    api.open_and_plan(model, targets(codes)[0])[0].close()


@pytest.mark.parametrize("kind", ["codes", "ranges"])
def test_they_must_not_change_meanwhile(kind: str, model: Path, codes: Path, tmp_path: Path) -> None:
    path, target = codes, targets(codes)[0]
    if kind == "ranges":
        path = tmp_path / "ranges.safetensors"
        save_file(ranges_of(tiny.tensors()), path)
        target = TensorRTLLM(quant="smoothquant", activation_ranges=str(path))
    right, held = path.read_bytes(), load_file(path)

    def edit() -> None:
        held[f"{UP}.{'weight_scale' if kind == 'codes' else 'x'}"] *= 1.5
        header = right[: 8 + int.from_bytes(right[:8], "little")]
        save_file(held, path, metadata={"calibration": json.loads(header[8:])["__metadata__"]["calibration"]} if kind == "codes" else None)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SourceChangedError, match=path.name):
        convert(model, target, tmp_path / "a", 0.3, edit)
    path.write_bytes(right)
    with pytest.raises(KeyboardInterrupt):
        convert(model, target, tmp_path / "b", 0.6, stop)
    edit()
    with pytest.raises(ResumeError, match=path.name):
        convert(model, target, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
