"""SmoothQuant and the INT8 KV cache against NVIDIA's recipe on whole matrices, written with numpy."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from streamconv import api
from streamconv.allocation import costs_of
from streamconv.errors import DataError, RefusedError, StreamconvError, TensorError, UsageError
from streamconv.options import Resources
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, Progress
from streamconv.run.order import ReductionResults, Stop
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

F16, F32, F64 = np.float16, np.float32, np.float64
Array = np.ndarray[Any, Any]
MODULES = [f"self_attn.{side}_proj" for side in "qkvo"] + [f"mlp.{side}_proj" for side in ("gate", "up", "down")]


def ranges_of(weights: dict[str, Array], seed: int = 3) -> dict[str, Array]:
    random, found = np.random.default_rng(seed), {}
    for name, weight in weights.items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            found[module + ".x"] = random.uniform(0.01, 9, weight.shape[1]).astype(F32)
            found[module + ".y"] = random.uniform(0.01, 30, weight.shape[0]).astype(F32)
    for layer in range(tiny.LAYERS):  # one input, one range
        for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            first = found[f"model.layers.{layer}.{group[0]}_proj.x"]
            for other in group[1:]:
                found[f"model.layers.{layer}.{other}_proj.x"] = first
    found["model.layers.0.mlp.down_proj.x"][5] = 0  # the smoother is clamped
    return found


@pytest.fixture
def weights() -> dict[str, Array]:
    made = tiny.tensors(dtype="float32")
    made["model.layers.0.self_attn.q_proj.weight"][3] = 0  # a row of zeros
    made["model.layers.0.mlp.gate_proj.weight"][7] *= 1e-4  # the scale overflows
    made["model.layers.1.mlp.down_proj.weight"][:, 9] *= 40
    return made


@pytest.fixture
def model(tmp_path: Path, weights: dict[str, Array]) -> Path:
    save_file(ranges_of(weights), tmp_path / "ranges.safetensors")
    return tiny.write(tmp_path / "model", weights)


def ask(model: Path, **changes: Any) -> TensorRTLLM:
    settings: dict[str, Any] = {"quant": "smoothquant", "activation_ranges": str(model.parent / "ranges.safetensors")}
    return TensorRTLLM(**(settings | changes))


# ---- the reference: whole matrices, rounding as NVIDIA's converter does


def smooth(group: list[Array], x: Array, version: str) -> tuple[Array, list[Array]]:
    half = [weight.astype(F16) for weight in group]
    m = np.abs(np.concatenate(half)).max(0)
    roots = np.sqrt(m.astype(F32)).astype(F16).astype(F64) if version == "0.16" else np.sqrt(np.maximum(m.astype(F64), 1e-5))
    s = np.maximum(np.sqrt(x.astype(F64)) / roots, 1e-5)
    return s, [half_of(weight.astype(F64) * s) for weight in half]


def half_of(value: Array) -> Array:
    """float64 as float16, by way of float32 as torch has it."""
    return value.astype(F32).astype(F16)


def scales(aw: Array) -> tuple[Array, Array]:
    sw = (F32(127) * (F32(1) / aw.astype(F32)).astype(F16).astype(F32)).astype(F16)
    return sw, (F32(1) / sw.astype(F32)).astype(F16)


def rounded(value: Array, dtype: str) -> Array:
    """Values rounded to a model dtype, as float32; bfloat16 to nearest even by hand."""
    if dtype == "float16":
        return value.astype(F16).astype(F32)
    bits = value.astype(F32).view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(value), even.view(F32), value).astype(F32)


def load(path: Path) -> dict[str, Array]:
    """Integers as they are, everything else as float32."""
    found = load_file(path)
    return {name: value.numpy() if value.dtype.itemsize == 1 else value.float().numpy() for name, value in found.items()}


def clip(value: Array) -> Array:
    value = np.nan_to_num(value.astype(F32), nan=0.0, posinf=127, neginf=-127)
    made: Array = np.clip(np.rint(value), -127, 127).astype(np.int8)
    return made


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def reference(
    weights: dict[str, Array], ranges: dict[str, Array], dtype: str, per_channel: bool, per_token: bool, version: str
) -> dict[str, Array]:
    """Tensors of one rank, by name, without the plain ones."""
    out: dict[str, Array] = {}
    for layer in range(tiny.LAYERS):
        source, prefix = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for roles, modules, norm in (
            (("self_attn.q", "self_attn.k", "self_attn.v"), ("attention.qkv",), ("input_layernorm", "input_layernorm")),
            (("self_attn.o",), ("attention.dense",), None),
            (("mlp.gate", "mlp.up"), ("mlp.fc", "mlp.gate"), ("post_attention_layernorm", "post_layernorm")),
            (("mlp.down",), ("mlp.proj",), None),
        ):
            x = ranges[f"{source}{roles[0]}_proj.x"]
            s, made = smooth([weights[f"{source}{role}_proj.weight"] for role in roles], x, version)
            sx = 127 / (x.astype(F64) / s).max()
            if norm:
                divided = half_of(weights[f"{source}{norm[0]}.weight"].astype(F16).astype(F64) / s)
                out[f"{prefix}{norm[1]}.weight"] = rounded(divided, dtype)
                out[f"{prefix}{norm[1]}.scale_to_int"] = np.array([1 if per_token else sx], F32)
            else:
                out[f"{prefix}{modules[0]}.smoother"] = s.astype(F32)[None]
                if not per_token:
                    out[f"{prefix}{modules[0].split('.')[0]}.quantization_scaling_factor"] = np.array([sx], F32)
            outputs = [ranges[f"{source}{role}_proj.y"].max() for role in roles]
            if len(modules) == 1:
                outputs = [max(outputs)]
            for number, module in enumerate(modules):
                mine = made if len(modules) == 1 else [made[number]]
                qkv = module == "attention.qkv"
                sy = F32(127) * (F32(1) / F32(outputs[number]))
                integers, factors = [], []
                for weight in mine:
                    aw = np.abs(weight).max(1)
                    value: Array
                    factor: Any
                    sw, inv = scales(aw if per_channel else aw.max())
                    column = sw.astype(F32)[..., None] if per_channel else sw.astype(F32)
                    if qkv and not per_channel:
                        value = (weight.astype(F32) / inv.astype(F32)).astype(F16)  # GQA
                    elif qkv:
                        value = weight.astype(F32) * column
                    else:
                        value = rounded(weight, dtype) * column
                        value = value if per_channel else rounded(value, dtype)
                    integers.append(clip(value))
                    if per_token:
                        factor = inv.astype(F32)
                    elif per_channel or qkv:
                        factor = (sy / (F32(sx) * sw.astype(F32))).astype(F32)
                    else:
                        factor = F32(F64(sy) / (sx * F64(sw)))
                    factors.append(np.broadcast_to(factor, weight.shape[:1] if qkv or per_channel else (1,)))
                out[f"{prefix}{module}.weight"] = np.concatenate(integers)
                out[f"{prefix}{module}.per_channel_scale"] = np.concatenate(factors)[None].astype(F32)
                if not per_token:
                    out[f"{prefix}{module}.act_scale"] = np.array([[F32(outputs[number]) / F32(127)]], F32)
    return out


def cut(name: str, whole: Array, rank: int) -> Array:
    """Rank `rank` of two."""
    if name.endswith(("dense.weight", "proj.weight", "smoother")):
        return np.split(whole, 2, 1)[rank]
    if "qkv.weight" in name or "qkv.per_channel_scale" in name:
        size = tiny.HIDDEN // tiny.HEADS
        axis = 0 if name.endswith("weight") else 1
        edges = [tiny.HEADS * size, (tiny.HEADS + tiny.KV) * size]
        return np.concatenate([np.split(part, 2, axis)[rank] for part in np.split(whole, edges, axis)], axis)
    if name.endswith(("fc.weight", "gate.weight")):
        return np.split(whole, 2, 0)[rank]
    if name.endswith(("fc.per_channel_scale", "gate.per_channel_scale")) and whole.shape[1] > 1:
        return np.split(whole, 2, 1)[rank]
    return whole


WAYS = list(itertools.product(("float16", "bfloat16"), (False, True), (False, True), ("0.16", "1.2")))
HALF = [
    pytest.param(*way, marks=pytest.mark.slow if sum(value in ("bfloat16", True, "1.2") for value in way) % 2 else ()) for way in WAYS
]
"""Any three of the four stand together in every way."""


@pytest.mark.parametrize(("dtype", "per_channel", "per_token", "version"), HALF)
def test_whole_matrix_reference(
    model: Path, weights: dict[str, Array], tmp_path: Path, dtype: str, per_channel: bool, per_token: bool, version: str
) -> None:
    options = ask(model, dtype=dtype, per_channel=per_channel, per_token=per_token, tp_size=2, target_version=version)
    api.convert(model, tmp_path / "out", options, Resources(tile_rows=5, workers=3))
    expected = reference(weights, ranges_of(weights), dtype, per_channel, per_token, version)
    for rank in range(2):
        found = load(tmp_path / "out" / f"rank{rank}.safetensors")
        plain = {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}
        assert set(found) == set(expected) | plain
        for name, whole in expected.items():
            want = cut(name, whole, rank)
            assert found[name].shape == want.shape, name
            assert found[name].tobytes() == want.tobytes(), name
        embedding = rounded(weights["model.embed_tokens.weight"].astype(F16), dtype)
        assert found["transformer.vocab_embedding.weight"].tobytes() == embedding.tobytes()
    verdict = verify(tmp_path / "out", model)
    assert not verdict.problems


@pytest.mark.parametrize("flags", [["--quant", "smoothquant"], ["--quant", "fp8"], ["--kv-cache", "int8"]])
def test_a_conversion_does_without_torch(model: Path, tmp_path: Path, flags: list[str]) -> None:
    code = (
        "import sys; from streamconv.cli.main import main\nstatus = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else status)"
    )
    ranges = str(model.parent / "ranges.safetensors")
    argv = ["convert", str(model), str(tmp_path / "out"), *flags, "--activation-ranges", ranges, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plan_says_whether_torch_is_loaded(model: Path) -> None:
    plans = [planned(model, ask(model, smoothquant=alpha)) for alpha in (0.5, 0.8)]
    assert [any(cost.torch for cost in costs_of(Reads([plan]))) for plan in plans] == [False, True]


def test_resumed_after_a_failure(model: Path, tmp_path: Path) -> None:
    """The earlier passes run again, tiles that were written are kept, and the bytes are the same."""
    few = Resources(tile_rows=16, workers=1)
    api.convert(model, tmp_path / "whole", ask(model), few)

    def stop_late(now: Progress) -> None:
        if now.done >= now.total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert(model, tmp_path / "out", ask(model), few, meter=Meter(stop_late, every=0))
    again = api.convert(model, tmp_path / "out", ask(model), few)
    assert again.resumed > 0
    for path in (tmp_path / "whole").glob("rank*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_kv_cache_factor(model: Path, weights: dict[str, Array], tmp_path: Path) -> None:
    api.convert(model, tmp_path / "out", ask(model, quant="none", kv_cache="int8", tp_size=2))
    ranges = ranges_of(weights)
    for rank in range(2):
        found = load(tmp_path / "out" / f"rank{rank}.safetensors")
        for layer in range(tiny.LAYERS):
            top = max(ranges[f"model.layers.{layer}.self_attn.{side}_proj.y"].max() for side in "qkv")
            factor = found[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert factor.shape == (1,) and factor[0] == F32(top) / F32(127)


def planned(model: Path, options: TensorRTLLM) -> Plan:
    index, plan = api.open_and_plan(model, options)
    index.close()
    return plan


def test_passes_are_planned_in_order_and_counted(model: Path) -> None:
    linear = sum(w.nbytes for name, w in tiny.tensors(dtype="float32").items() if "_proj" in name)
    once = planned(model, TensorRTLLM()).bytes_read
    channel, tensor = planned(model, ask(model, per_channel=True)), planned(model, ask(model))
    assert (channel.passes, tensor.passes) == (2, 2)  # column maxima give the largest of the smoothed matrix too
    assert channel.bytes_read == tensor.bytes_read == once + linear
    done = set[str]()
    for span in tensor.spans:
        needs = span.reduce.needs if span.reduce else [k for d in span.dests for k in tensor.matrices[d.matrix].codec.needs]
        assert set(needs) <= done
        if span.reduce:
            done.add(span.reduce.key)


def test_the_content_of_the_ranges_is_in_the_fingerprint(model: Path, weights: dict[str, Array]) -> None:
    before = planned(model, ask(model)).fingerprint()
    (moved := model.parent / "elsewhere").mkdir()
    save_file(ranges_of(weights), moved / "ranges.safetensors")
    assert planned(model, ask(model, activation_ranges=str(moved / "ranges.safetensors"))).fingerprint() == before
    save_file(ranges_of(weights, seed=4), model.parent / "ranges.safetensors")
    assert planned(model, ask(model)).fingerprint() != before


def test_a_column_of_zeros_is_refused_for_0_16(tmp_path: Path, weights: dict[str, Array]) -> None:
    """1.x takes 1e-5 in the place of its maximum."""
    weights["model.layers.1.self_attn.o_proj.weight"][:, 6] = 0
    save_file(ranges_of(weights), tmp_path / "ranges.safetensors")
    model = tiny.write(tmp_path / "model", weights)
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.o_proj\.weight: input channel 6"):
        api.convert(model, tmp_path / "out", ask(model, target_version="0.16"))
    assert not (tmp_path / "out").exists()
    api.convert(model, tmp_path / "out", ask(model))
    smoother = load(tmp_path / "out" / "rank0.safetensors")["transformer.layers.1.attention.dense.smoother"]
    x = ranges_of(weights)["model.layers.1.self_attn.o_proj.x"][6]
    assert smoother[0, 6] == F32(np.sqrt(F64(x)) / np.sqrt(1e-5))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"tp_size": 4}, "num_key_value_heads 2"),
        ({"head_dim": 64}, {}, "is not hidden_size"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}, {}, "Llama type and Qwen2"),
        ({}, {"smoothquant": 1.5}, "alpha"),
    ],
)
def test_refusals(model: Path, settings: dict[str, Any], options: dict[str, Any], message: str) -> None:
    (model / "config.json").write_text(json.dumps(tiny.config(**settings)))
    with pytest.raises(RefusedError, match=message):
        planned(model, ask(model, **options))


def test_ranges_are_asked_for(model: Path) -> None:
    for options in (TensorRTLLM(quant="smoothquant"), TensorRTLLM(kv_cache="int8")):
        with pytest.raises(UsageError, match="needs activation ranges") as told:
            planned(model, options)
        assert "streamconv calibrate" in str(told.value.hint)
    with pytest.raises(UsageError, match="only"):
        planned(model, ask(model, quant="int8", target_sm=80))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mlp.up_proj.y", None, "missing"),
        ("mlp.down_proj.x", np.ones(3, F32), r"F32 \[3\]"),
        ("self_attn.q_proj.x", np.full(tiny.HIDDEN, np.nan, F32), "not finite"),
        ("self_attn.q_proj.x", np.zeros(tiny.HIDDEN, F32), "zero"),
    ],
)
def test_bad_ranges(model: Path, weights: dict[str, Array], name: str, value: Array | None, message: str) -> None:
    ranges = ranges_of(weights)
    del ranges[f"model.layers.1.{name}"]
    if value is not None:
        ranges[f"model.layers.1.{name}"] = value
    save_file(ranges, model.parent / "ranges.safetensors")
    with pytest.raises(TensorError, match=message):
        planned(model, ask(model))


def test_no_such_ranges(model: Path) -> None:
    with pytest.raises(StreamconvError, match="no such file"):
        planned(model, ask(model, activation_ranges="nowhere"))


def test_a_waiting_worker_is_released(model: Path) -> None:
    results, met = ReductionResults(planned(model, ask(model)).spans), list[str]()
    key = next(iter(results._missing))

    def wait() -> None:
        try:
            results.get(key)
        except Stop:
            met.append("stopped")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    results.stop()
    thread.join(100)
    assert met == ["stopped"]
