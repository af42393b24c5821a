"""Quantized sources decoded to floats: GPTQ, AutoAWQ, the MXFP4 experts of gpt-oss, FP8 tiles with scales of any type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv import api
from streamconv.errors import CheckpointError, RefusedError
from streamconv.open_plan import open_and_plan
from streamconv.options import Resources
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny

NONE = HuggingFace()
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Tensors = dict[str, torch.Tensor]


def packed(values: np.ndarray[Any, Any], bits: int, axis: int, order: list[int] | None = None) -> torch.Tensor:
    """Unsigned integers -> int32 words along an axis, the first in the lowest bits."""
    per = 32 // bits
    wide = np.moveaxis(values, axis, -1).astype(np.uint32)
    wide = wide.reshape(*wide.shape[:-1], -1, per)[..., order or range(per)]
    words = np.zeros(wide.shape[:-1], np.uint32)
    for at in range(per):
        words |= wide[..., at] << np.uint32(bits * at)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32).copy())


def integer_weight(n: int, k: int, group: int, method: str, *, bits: int = 4, v2: bool = False, order: bool = False) -> tuple[Tensors, Any]:
    """The tensors of a weight, and the weight as float64."""
    random = np.random.default_rng(n + k + bits)
    codes, zeros = random.integers(0, 1 << bits, (k, n)), random.integers(1, 1 << bits, (k // group, n))
    scales = random.uniform(0.001, 0.02, (k // group, n)).astype(np.float16)
    index = np.arange(k) // group
    if order:
        index = random.permutation(index)
    weight = ((codes - zeros[index]) * scales[index].astype(np.float64)).T
    if method == "awq":
        made = {"qweight": packed(codes, 4, 1, AWQ_ORDER), "qzeros": packed(zeros, 4, 1, AWQ_ORDER)}
    else:
        made = {"qweight": packed(codes, bits, 0), "qzeros": packed(zeros - (0 if v2 else 1), bits, 1)}
    made["scales"] = torch.from_numpy(scales)
    if order:
        made["g_idx"] = torch.from_numpy(index.astype(np.int32))
    return made, weight


def source(folder: Path, stated: dict[str, Any], weights: Tensors, **changes: Any) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = tiny.config(torch_dtype="float16", quantization_config=stated, num_hidden_layers=tiny.layers(weights), **changes)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("rows", [None, 8, 24])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq_v2", "gptq8", "act_order"])
def test_integers(tmp_path: Path, kind: str, dtype: str, rows: int | None) -> None:
    method, bits = ("awq" if kind == "awq" else "gptq"), (8 if kind == "gptq8" else 4)
    made, weight = integer_weight(72, 128, 32, method, bits=bits, v2=kind == "gptq_v2", order=kind == "act_order")
    stated = {"quant_method": method, "bits": bits, "group_size": 32, "version": "gemm", "desc_act": kind == "act_order"}
    stated |= {"checkpoint_format": "gptq_v2" if kind == "gptq_v2" else "gptq"} if method == "gptq" else {}
    name = "model.layers.0.mlp.up_proj"
    norm = torch.ones(8, dtype=torch.float16)
    folder = source(tmp_path / "source", stated, {f"{name}.{leaf}": t for leaf, t in made.items()} | {"model.norm.weight": norm})
    report = api.convert(folder, tmp_path / "out", HuggingFace(dtype=dtype), Resources(tile_rows=rows, workers=2))
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == {f"{name}.weight", "model.norm.weight"} and any("decoded" in line for line in report.warnings)
    want = torch.from_numpy(np.ascontiguousarray(weight)).float().to(getattr(torch, dtype))  # an integer times float16 is exact in float32
    assert torch.equal(got[f"{name}.weight"], want)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert verify(tmp_path / "out", folder).problems == []


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_auto_round(tmp_path: Path, packing: str) -> None:
    """Its own packing is GPTQ's with zero points as they are."""
    made, weight = integer_weight(72, 128, 32, "awq" if packing.endswith("awq") else "gptq", v2=packing == "auto_round")
    stated = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    name = "model.layers.0.mlp.up_proj"
    folder = source(tmp_path / "source", stated, {f"{name}.{leaf}": t for leaf, t in made.items()})
    api.convert(folder, tmp_path / "out", HuggingFace(dtype="float32"))
    want = torch.from_numpy(np.ascontiguousarray(weight)).float()
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"], want)


def act_ordered(folder: Path, symmetric: bool, actorder: object = "group", leave: str = "") -> tuple[Path, Any]:
    """A weight of compressed-tensors whose groups do not come one after the other, and the weight as float64."""
    random = np.random.default_rng(7)
    n, k, group = 24, 128, 32
    codes, index = random.integers(0, 16, (n, k)), random.permutation(np.arange(k) // group)
    zeros = np.full((n, k // group), 8) if symmetric else random.integers(0, 16, (n, k // group))
    scales = random.uniform(0.001, 0.02, (n, k // group)).astype(np.float16)
    made = {"weight_packed": packed(codes, 4, 1), "weight_scale": torch.from_numpy(scales), "weight_shape": torch.tensor([n, k])}
    made |= {"weight_g_idx": torch.from_numpy(index.astype(np.int32))}
    made |= {} if symmetric else {"weight_zero_point": packed(zeros, 4, 0)}
    made = {leaf: held for leaf, held in made.items() if leaf != leave}
    args = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group, "actorder": actorder}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}  # fmt: skip
    weight = (codes - zeros[:, index]) * scales[:, index].astype(np.float64)
    return source(folder, stated, {f"model.layers.0.mlp.up_proj.{leaf}": held for leaf, held in made.items()}), weight


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_of_compressed_tensors(tmp_path: Path, symmetric: bool, rows: int | None) -> None:
    folder, weight = act_ordered(tmp_path / "source", symmetric)
    api.convert(folder, tmp_path / "out", HuggingFace(dtype="float32"), Resources(tile_rows=rows, workers=2))
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == {"model.layers.0.mlp.up_proj.weight"}
    assert torch.equal(got["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(weight).float())
    assert verify(tmp_path / "out", folder).problems == []
    report = api.convert(folder, tmp_path / "kept", HuggingFace(quant="keep"))
    assert any("act order" in line for line in report.warnings)
    assert (tmp_path / "kept/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("quant", ["none", "keep"])
@pytest.mark.parametrize(
    ("actorder", "leave", "says"),
    [(None, "", "weight_g_idx is no part"), ("group", "weight_g_idx", "no weight_g_idx"), ("odd", "", "actorder is 'odd'")],
)
def test_act_order_that_is_half_told(tmp_path: Path, quant: str, actorder: object, leave: str, says: str) -> None:
    folder, _ = act_ordered(tmp_path / "source", True, actorder, leave)
    with pytest.raises(CheckpointError, match=says):
        api.convert(folder, tmp_path / "out", HuggingFace(quant=quant))


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_both_names_of_a_gptq_format(tmp_path: Path, key: str) -> None:
    made, weight = integer_weight(72, 128, 32, "gptq", v2=True)
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, key: "gptq_v2"}
    folder = source(tmp_path / "source", stated, {f"model.layers.0.mlp.up_proj.{leaf}": t for leaf, t in made.items()})
    api.convert(folder, tmp_path / "out", HuggingFace(dtype="float32"))
    want = torch.from_numpy(np.ascontiguousarray(weight)).float()
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"], want)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"dynamic": {"-:.*down.*": {}, "+:.*up.*": {"bits": 8}}}, "dynamic states other bits"),
        ({"dynamic": {".*up.*": {"group_size": 64}}}, "dynamic states other bits"),
        ({"checkpoint_format": "gptq", "format": "bitblas"}, "format 'bitblas'"),
    ],
)
def test_gptq_that_says_more(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    made, _ = integer_weight(72, 128, 32, "gptq")
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    names = {f"model.layers.0.mlp.up_proj.{leaf}": t for leaf, t in made.items()}
    with pytest.raises(RefusedError, match=says):
        api.open_and_plan(source(tmp_path / "source", stated | more, names), NONE)
    left = {"dynamic": {"-:.*down.*": {}}}
    api.open_and_plan(source(tmp_path / "left", stated | left, names), NONE)


def test_decoded_integers_are_quantized_anew(tmp_path: Path) -> None:
    """Through the plain weights or at once: the same bytes."""
    made, _ = integer_weight(64, 128, 64, "awq")
    stated = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    folder = source(tmp_path / "source", stated, {f"model.layers.0.mlp.down_proj.{leaf}": t for leaf, t in made.items()})
    api.convert(folder, tmp_path / "plain", NONE)
    for quant in ("nvfp4a16", "fp8_dynamic", "w4a16"):
        api.convert(folder, tmp_path / quant, HuggingFace(quant=quant), Resources(tile_rows=8))
        api.convert(tmp_path / "plain", tmp_path / f"{quant}2", HuggingFace(quant=quant))
        assert (tmp_path / quant / "model.safetensors").read_bytes() == (tmp_path / f"{quant}2" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("broken", ["no scales", "short zeros", "marlin", "3 bits", "far group"])
def test_integers_that_do_not_fit(tmp_path: Path, broken: str) -> None:
    made, _ = integer_weight(64, 128, 64, "gptq", order=True)
    stated: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    if broken == "no scales":
        del made["scales"]
    elif broken == "short zeros":
        made["qzeros"] = made["qzeros"][:, :-1].contiguous()
    elif broken == "far group":
        made["g_idx"][5] = 99
    else:
        stated |= {"checkpoint_format": "marlin"} if broken == "marlin" else {"bits": 3}
    folder = source(tmp_path / "source", stated, {f"model.layers.0.mlp.down_proj.{leaf}": t for leaf, t in made.items()})
    with pytest.raises(CheckpointError, match=r"down_proj"):
        api.convert(folder, tmp_path / "out", NONE)
    assert not (tmp_path / "out").exists()


E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def gpt_oss(folder: Path) -> tuple[Path, Tensors]:
    """gpt-oss's experts, and what transformers makes of them (`convert_moe_packed_tensors`): codes times 2^scale, transposed."""
    random = torch.Generator().manual_seed(3)
    weights, want = {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}, {}
    for name, n, k in (("gate_up_proj", 96, 64), ("down_proj", 64, 160)):
        at = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (3, n, k // 32, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(110, 131, (3, n, k // 32), dtype=torch.uint8, generator=random)
        weights |= {f"{at}_blocks": blocks, f"{at}_scales": scales, f"{at}_bias": torch.zeros(3, n, dtype=torch.bfloat16)}
        codes = torch.stack([blocks & 15, blocks >> 4], 4).reshape(3, n, k // 32, 32).long()
        plain = torch.ldexp(E2M1[codes], (scales.int() - 127)[..., None]).reshape(3, n, k)
        want[at] = plain.transpose(1, 2).contiguous().bfloat16()
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return source(folder, stated, weights, model_type="gpt_oss"), want


def test_the_statement_of_gpt_oss_is_kept(tmp_path: Path) -> None:
    """Its list names attentions by a pattern of transformers; MXFP4 is for experts alone."""
    folder, _ = gpt_oss(tmp_path / "source")
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.self_attn.o_proj.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert not [line for line in verify(folder).problems if "self_attn" in line]
    api.convert(folder, tmp_path / "kept", HuggingFace(quant="keep"))
    assert (tmp_path / "kept/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rows", [None, 32, 64])
def test_gpt_oss(tmp_path: Path, rows: int | None) -> None:
    folder, want = gpt_oss(tmp_path / "source")
    api.convert(folder, tmp_path / "out", HuggingFace(dtype="bfloat16"), Resources(tile_rows=rows, workers=2))
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == {*want, *(f"{name}_bias" for name in want), "model.norm.weight"}
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape and torch.equal(got[name].view(torch.int16), tensor.view(torch.int16))
    assert verify(tmp_path / "out", folder).problems == []


def test_experts_that_stay_are_named(tmp_path: Path) -> None:
    """Neither axis is the hidden size."""
    folder, _ = gpt_oss(tmp_path / "source")
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.o_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16)}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "hidden_size": 72}))
    report = api.convert(folder, tmp_path / "out", HuggingFace(quant="fp8_dynamic"))
    assert any("experts.down_proj" in line and "stay float16" in line for line in report.warnings)


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("quant", ["fp8_dynamic", "nvfp4a16", "mxfp4"])
def test_gpt_oss_is_quantized_anew(tmp_path: Path, quant: str, rows: int | None) -> None:
    """As from a model that holds one weight for each expert: gate and up take turns in the stored rows."""
    folder, stacked = gpt_oss(tmp_path / "source")
    plain: Tensors = {}
    bias = torch.arange(3 * 96, dtype=torch.bfloat16).reshape(3, 96)
    held = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.experts.gate_up_proj_bias": bias}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in stacked.items():
        module, _, last = name.rpartition(".")
        for expert in range(3):
            rows_out, own = tensor[expert].T, held[f"{name}_bias"][expert]
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)} if last == "gate_up_proj" else {last: slice(None)}
            for part, taken in parts.items():
                plain[f"{module}.{expert}.{part}.weight"] = rows_out[taken].contiguous()
                plain[f"{module}.{expert}.{part}.bias"] = own[taken].contiguous()
    (tmp_path / "plain").mkdir()
    save_file(plain | {"model.norm.weight": held["model.norm.weight"]}, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16", "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    del config["quantization_config"]
    (tmp_path / "plain/config.json").write_text(json.dumps(config | {"model_type": "other"}))
    report = api.convert(folder, tmp_path / "one", HuggingFace(quant=quant), Resources(tile_rows=rows, workers=2))
    api.convert(tmp_path / "plain", tmp_path / "two", HuggingFace(quant=quant))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert any("9 weights of the source are quantized" in line for line in report.warnings)
    if rows and quant == "fp8_dynamic":  # nobody reads these experts unquantized
        _, plan = open_and_plan(tmp_path / "one", HuggingFace())
        assert any("experts of this model type as one tensor a layer" in line for line in plan.warnings)
    assert verify(tmp_path / "one", folder).problems == []


@pytest.mark.parametrize(
    ("kind", "width", "transposed"),
    [("llama4", 48, True), ("gpt_oss", 48, True), ("unheard_of", 48, True), ("unheard_of", 32, True), ("unheard_of", 32, False),
     ("qwen3_vl_moe", 32, False), ("unheard_of", 64, True), ("qwen3_vl_moe", 64, False)],
)  # fmt: skip
def test_stacked_either_way(tmp_path: Path, kind: str, width: int, transposed: bool) -> None:
    """Float experts [E, in, out] or [E, out, in], also where one of the two tensors is square: as from a weight [out, in] for each."""
    random, at = torch.Generator().manual_seed(4), "model.layers.0.mlp.experts"
    gate_up = torch.randn(3, 64, 2 * width, generator=random).bfloat16()
    down = torch.randn(3, width, 64, generator=random).bfloat16()
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if kind == "gpt_oss" else gate_up.chunk(2, 2)
    plain = {f"{at}.{e}.{part}_proj.weight": whole[e].T.contiguous() for e in range(3) for part, whole in
             (("gate", gate), ("up", up), ("down", down))}  # fmt: skip
    if not transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    stacked = {f"{at}.gate_up_proj": gate_up, f"{at}.down_proj": down}
    for name, weights, model_type in (("stacked", stacked, kind), ("plain", plain, "other")):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = tiny.config(torch_dtype="bfloat16", num_hidden_layers=1, model_type=model_type, hidden_size=64)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"{name}_out"
        read: Any = "map" if name == "stacked" else "auto"
        api.convert(tmp_path / name, out, HuggingFace(quant="nvfp4a16"), Resources(tile_rows=8, read=read))
    assert (tmp_path / "stacked_out/model.safetensors").read_bytes() == (tmp_path / "plain_out/model.safetensors").read_bytes()


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_fp8_tiles(tmp_path: Path, scale: str, name: str) -> None:
    random = torch.Generator().manual_seed(5)
    codes = torch.randn(192, 320, generator=random).to(torch.float8_e4m3fn)
    powers = torch.randint(-6, 3, (2, 3), generator=random)
    values = torch.ldexp(torch.ones(2, 3), powers)
    stored = (powers + 127).to(torch.uint8) if scale in ("uint8", "float8_e8m0fnu") else values.to(getattr(torch, scale))
    stored = stored.view(torch.float8_e8m0fnu) if scale == "float8_e8m0fnu" else stored
    at = "model.layers.0.mlp.down_proj"
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    folder = source(tmp_path / "source", stated, {f"{at}.weight": codes, f"{at}.{name}": stored})
    api.convert(folder, tmp_path / "out", HuggingFace(dtype="bfloat16"))
    want = codes.float() * values.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :320]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{at}.weight"], want.bfloat16())
