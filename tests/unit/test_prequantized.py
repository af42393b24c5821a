"""Sources that are quantized already, against a whole-matrix implementation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.api import convert
from streamconv.checkpoint.dtypes import BF16, F16, F32, I8, U8, DType
from streamconv.cli.convert_checkpoint import main
from streamconv.errors import RefusedError, StreamconvError, TensorError, UsageError
from streamconv.options import Resources
from streamconv.quants.base import EncodeStats
from streamconv.quants.given_codes import GivenIntegers
from streamconv.quants.gptq import GroupScales, PackedWeight
from streamconv.quants.layout import Layout
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import Module, quant_of
from streamconv.verification.check import verify

HIDDEN, HEADS, KV, SIZE, WIDTH, VOCAB = 256, 8, 4, 32, 512, 64
SHAPES = {
    "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    "self_attn.k_proj": (KV * SIZE, HIDDEN),
    "self_attn.v_proj": (KV * SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * SIZE),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ = TensorRTLLM(quant="int4_gptq", group_size=64, target_sm=80)
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Linear:
    """Integers u [K, N], true zeros z [K/g, N] and float16 scales [K/g, N] of one layer."""

    u: np.ndarray[Any, Any]
    z: np.ndarray[Any, Any]
    s: torch.Tensor


def words(values: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """[..., 32/bits] -> int32 [...], first value in the lowest bits."""
    out = np.zeros(values.shape[:-1], np.uint64)
    for at in range(32 // bits):
        out |= values[..., at].astype(np.uint64) << np.uint64(at * bits)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32).copy())


def linears(bits: int, group: int, seed: int = 0) -> dict[str, Linear]:
    random = np.random.RandomState(seed)
    made = {}
    for name, (n, k) in SHAPES.items():
        u = random.randint(0, 1 << bits, (k, n))
        z = random.randint(1, 1 << bits, (k // group, n))
        s = torch.from_numpy(random.uniform(0.001, 0.02, (k // group, n)).astype(np.float16))
        made[name] = Linear(u, z, s)
    return made


def packed(kind: str, bits: int, made: dict[str, Linear]) -> Tensors:
    """Tensors of layer 0 as AutoGPTQ v1 or v2 or AutoAWQ write them."""
    tensors: Tensors = {}
    per = 32 // bits
    for name, one in made.items():
        path = f"model.layers.0.{name}."
        k, n = one.u.shape
        if kind == "awq":
            order = list(AWQ_ORDER)
            tensors[path + "qweight"] = words(one.u.reshape(k, n // 8, 8)[:, :, order], 4)
            tensors[path + "qzeros"] = words(one.z.reshape(-1, n // 8, 8)[:, :, order], 4)
        else:
            zeros = one.z - (1 if kind == "v1" else 0)
            tensors[path + "qweight"] = words(one.u.reshape(k // per, per, n).transpose(0, 2, 1), bits)
            tensors[path + "qzeros"] = words(zeros.reshape(-1, n // per, per), bits)
            tensors[path + "g_idx"] = torch.arange(k, dtype=torch.int32) // (k // one.z.shape[0])
        tensors[path + "scales"] = one.s
    return tensors


def rest(seed: int = 1) -> Tensors:
    torch.manual_seed(seed)
    names: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    names |= {name: (VOCAB, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    names |= {f"model.layers.0.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return {name: torch.randn(shape).to(torch.float16) for name, shape in names.items()}


def write(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None, **extra: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "num_hidden_layers": 1, "vocab_size": VOCAB,
        "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    config |= extra
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def source(folder: Path, kind: str, bits: int, group: int, made: dict[str, Linear], **extra: Any) -> Path:
    stated: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    stated["checkpoint_format"] = {"v1": "gptq", "v2": "gptq_v2"}.get(kind)
    if kind == "awq":
        stated = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return write(folder, rest() | packed(kind, bits, made), stated, **extra)


PERMUTE = {
    8: (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
    4: (0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
        4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31),
}  # fmt: skip


def processed(q: np.ndarray[Any, Any], bits: int, family: str) -> bytes:
    """Signed q [K, N] -> processed bytes, by the gather form."""
    k_count, n_count = q.shape
    slots = (0, 2, 1, 3) if bits == 8 else (0, 2, 4, 6, 1, 3, 5, 7)
    block = len(PERMUTE[bits])
    inter, tile = (2 if bits == 8 else 4, 64) if family == "sm80" else (1, k_count)
    m = np.arange(k_count * n_count)
    if family != "sm90-0.16":
        m = len(slots) * (m // len(slots)) + np.array(slots)[m % len(slots)]
    g, u = np.divmod(m, k_count * inter)
    t, v = np.divmod(u, tile * inter)
    j, r = np.divmod(v, tile)
    k = tile * t + r
    if family != "sm90-0.16":
        k = block * (k // block) + np.array(PERMUTE[bits])[k % block]
    values = (q[k, inter * g + j] + (0 if family == "sm90-0.16" else 1 << (bits - 1))) % (1 << bits)
    if bits == 4:
        values = values[0::2] | values[1::2] << 4
    return bytes(values.astype(np.uint8))


def share(x: Any, axis: int, tp: int, rank: int) -> Any:
    size = x.shape[axis] // tp
    return x[:, size * rank : size * (rank + 1)] if axis else x[size * rank : size * (rank + 1)]


def expected(
    made: dict[str, Linear], bits: int, tp: int, dtype: torch.dtype, family: str
) -> list[dict[str, tuple[bytes, torch.Tensor, torch.Tensor]]]:
    """For every rank: name -> bytes of the weight, scales and zeros, from whole matrices."""
    middle, ranks = 1 << (bits - 1), []
    for rank in range(tp):
        got = {}
        fused = {"attention.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.fc": ("gate_proj",), "mlp.gate": ("up_proj",)}
        for name, parts in fused.items():
            ones = [one for full, one in made.items() if full.split(".")[1] in parts]
            u = np.concatenate([share(one.u, 1, tp, rank) for one in ones], 1)
            z = torch.from_numpy(np.concatenate([share(one.z, 1, tp, rank) for one in ones], 1))
            s = torch.cat([share(one.s, 1, tp, rank) for one in ones], 1)
            got[name] = (u, z, s)
        for name, full in (("attention.dense", "self_attn.o_proj"), ("mlp.proj", "mlp.down_proj")):
            one = made[full]
            u, z, s = (share(x, 0, tp, rank) for x in (one.u, torch.from_numpy(one.z), one.s))
            got[name] = (u, z, s)
        ranks.append({
            name: (processed(u - middle, bits, family), s.to(dtype), (middle - z).to(dtype) * s.to(dtype))
            for name, (u, z, s) in got.items()
        })  # fmt: skip
    return ranks


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


CASES = [
    ("v1", 4, 64, 1, "float16", 80, "sm80"),
    ("v1", 4, 128, 2, "bfloat16", 90, "sm90"),
    ("v2", 4, 64, 2, "bfloat16", 80, "sm80"),
    ("v2", 8, 128, 1, "float16", 80, "sm80"),
    ("v1", 8, 64, 2, "bfloat16", 80, "sm80"),
    ("v1", 8, 128, 2, "float16", 90, "sm90"),
    ("awq", 4, 64, 2, "float16", 80, "sm80"),
    ("awq", 4, 128, 1, "bfloat16", 90, "sm90"),
]


@pytest.mark.parametrize("tile_rows", [None, 8])
@pytest.mark.parametrize(("kind", "bits", "group", "tp", "dtype", "sm", "family"), CASES)
def test_against_whole_matrices(
    tmp_path: Path, kind: str, bits: int, group: int, tp: int, dtype: str, sm: int, family: str, tile_rows: int | None
) -> None:
    made = linears(bits, group)
    model = source(tmp_path / "in", kind, bits, group, made)
    options = TensorRTLLM(tp_size=tp, quant=f"int{bits}_gptq", group_size=group, dtype=dtype, target_sm=sm)
    convert(model, tmp_path / "out", options, Resources(workers=2, tile_rows=tile_rows))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["group_size"]) == (f"W{bits}A16_GPTQ", group)
    assert config["has_zero_point"] is True and config["pre_quant_scale"] is False
    kept = getattr(torch, dtype)
    for number, wanted in enumerate(expected(made, bits, tp, kept, family)):
        got = load_file(tmp_path / f"out/rank{number}.safetensors")
        for name, (weight, scale, zero) in wanted.items():
            path = f"transformer.layers.0.{name}."
            groups, n = scale.shape
            assert raw(got[path + "weight"]) == weight, path
            assert got[path + "weight"].shape == (groups * group, n * bits // 16) and got[path + "weight"].dtype == kept
            for suffix, value in (("weights_scaling_factor", scale), ("zero", zero)):
                assert got[path + suffix].dtype == kept and got[path + suffix].shape == value.shape
                assert raw(got[path + suffix]) == raw(value), path + suffix


def test_c_layout_of_0_16_on_hopper(tmp_path: Path) -> None:
    made = linears(4, 64)
    options = TensorRTLLM(quant="int4_gptq", group_size=64, target_sm=90, target_version="0.16")
    convert(source(tmp_path / "in", "v1", 4, 64, made), tmp_path / "out", options)
    got = load_file(tmp_path / "out/rank0.safetensors")
    for name, (weight, _, _) in expected(made, 4, 1, torch.float16, "sm90-0.16")[0].items():
        assert raw(got[f"transformer.layers.0.{name}.weight"]) == weight


@pytest.mark.parametrize("kind", ["v1", "awq"])
def test_verify_against_source(tmp_path: Path, kind: str) -> None:
    model = source(tmp_path / "in", kind, 4, 64, linears(4, 64))
    report = convert(model, tmp_path / "out", dataclasses.replace(GPTQ, tp_size=2, dtype="bfloat16"))
    size = sum(tensor.nbytes for name, tensor in load_file(model / "model.safetensors").items() if "g_idx" not in name)
    assert report.bytes_read == size  # every byte once, for both ranks
    verdict = verify(tmp_path / "out", model)
    assert not verdict.problems
    weights = [line for line in verdict.errors if line.name.endswith("attention.qkv.weight")]
    assert len(weights) == 2 and all(line.largest == 0 for line in weights)


def test_imported_by_itself_for_1_2_only(tmp_path: Path) -> None:
    model = source(tmp_path / "in", "v1", 4, 64, linears(4, 64))
    convert(model, tmp_path / "out", TensorRTLLM(target_sm=80))
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("W4A16_GPTQ", 64)
    with pytest.raises(RefusedError, match="--quant int4_gptq --group-size 64"):
        convert(model, tmp_path / "old", TensorRTLLM(target_sm=80, target_version="0.16"))
    with pytest.raises(UsageError, match="--target-sm is required"):
        convert(model, tmp_path / "none", TensorRTLLM())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant": "int8"}, "use --quant int4_gptq"),
        ({"group_size": 128}, "use --group-size 64"),
        ({"tp_size": 8}, "num_key_value_heads 4"),
        ({"dtype": "float32"}, "float16 or bfloat16"),
        ({"encoding": "raw"}, "always stored processed"),
        ({"quant": "nvfp4"}, "ModelOpt makes it"),
        ({"quant": "w4a8_awq"}, "ModelOpt makes it"),
        ({"quant": "qserve"}, "DeepCompressor"),
    ],
)
def test_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    model = source(tmp_path / "in", "v1", 4, 64, linears(4, 64))
    options = dataclasses.replace(GPTQ, **change)
    with pytest.raises(RefusedError) as caught:
        convert(model, tmp_path / "out", options)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_gptq_formats_that_nothing_is_known_of(tmp_path: Path) -> None:
    """What a zero point means depends on the format."""
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"}
    model = write(tmp_path / "in", rest() | packed("v1", 4, linears(4, 64)), stated)
    with pytest.raises(RefusedError, match="checkpoint_format 'marlin' is not supported, gptq and gptq_v2 are"):
        convert(model, tmp_path / "out", GPTQ)


@pytest.mark.parametrize(("rows", "version", "fine"), [(128, "0.16", False), (129, "0.16", True), (64, "1.2", True)])
def test_awq_scales_that_a_release_would_turn(rows: int, version: str, fine: bool) -> None:
    """8192 inputs in groups of 64 are 128 groups; only releases 0.13 to 0.16 guess from the shape."""
    module = Module("mlp.proj", 0, 1, rows, 8192, rows, 8192, 0, 1)
    options = TensorRTLLM(quant="int4_awq", group_size=64, target_version=version)  # type: ignore[arg-type]
    try:
        said = str(quant_of("int4_awq").codec(module, options, F16))
    except RefusedError as error:
        said = str(error)
    assert fine == ("read the scales turned" not in said)


def test_act_order_refused(tmp_path: Path) -> None:
    tensors = rest() | packed("v1", 4, linears(4, 64))
    order = tensors["model.layers.0.mlp.up_proj.g_idx"]
    order[3], order[100] = order[100].clone(), order[3].clone()
    model = write(tmp_path / "in", tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True})
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.mlp\.up_proj\.g_idx: act-order"):
        convert(model, tmp_path / "out", GPTQ)


def test_bits_that_do_not_fit(tmp_path: Path) -> None:
    model = write(tmp_path / "in", rest() | packed("v1", 4, linears(4, 64)), None)
    with pytest.raises(RefusedError, match="do not fit together at 8 bits"):
        convert(model, tmp_path / "out", TensorRTLLM(quant="int8_gptq", group_size=64, target_sm=80))


@pytest.mark.parametrize("missing", ["qzeros", "scales", "qweight"])
def test_missing_companion(tmp_path: Path, missing: str) -> None:
    tensors = rest() | packed("v1", 4, linears(4, 64))
    del tensors[f"model.layers.0.mlp.up_proj.{missing}"]
    with pytest.raises((RefusedError, TensorError), match=r"mlp\.up_proj"):
        convert(write(tmp_path / "in", tensors, None), tmp_path / "out", GPTQ)


def test_a_layer_left_unquantized(tmp_path: Path) -> None:
    tensors = rest() | packed("v1", 4, linears(4, 64))
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"model.layers.0.mlp.up_proj.{suffix}"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(WIDTH, HIDDEN, dtype=torch.float16)
    with pytest.raises(TensorError, match="is not quantized, for this --quant it must be"):
        convert(write(tmp_path / "in", tensors, None), tmp_path / "out", GPTQ)


def test_row_bias_only_on_the_first_rank(tmp_path: Path) -> None:
    tensors = rest() | packed("v1", 4, linears(4, 64))
    for name in ("q", "k", "v", "o"):
        rows = SHAPES[f"self_attn.{name}_proj"][0]
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = torch.randn(rows).to(torch.float16)
    model = write(tmp_path / "in", tensors, None, attention_bias=True)
    convert(model, tmp_path / "out", TensorRTLLM(tp_size=2, quant="int4_gptq", group_size=64, target_sm=80))
    ranks = [load_file(tmp_path / f"out/rank{rank}.safetensors") for rank in range(2)]
    name = "transformer.layers.0.attention.dense.bias"
    assert torch.equal(ranks[0][name], tensors["model.layers.0.self_attn.o_proj.bias"])
    assert not ranks[1][name].any()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_has_not(tmp_path: Path, value: float) -> None:
    tensors = rest() | packed("v1", 4, linears(4, 64))
    for name, (rows, _) in SHAPES.items():
        tensors[f"model.layers.0.{name}.bias"] = torch.full((rows,), value, dtype=torch.float16)
    model = write(tmp_path / "in", tensors, None)
    if value:
        with pytest.raises(TensorError, match=r"unexpected tensor model\.layers\.0\..*bias"):
            convert(model, tmp_path / "out", GPTQ)
    else:
        convert(model, tmp_path / "out", GPTQ)
        assert not [name for name in load_file(tmp_path / "out/rank0.safetensors") if name.endswith("bias")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--use_nvfp4"], "ModelOpt makes it"),
        (["--use_qserve"], "DeepCompressor"),
        (["--quant_ckpt_path", "x.safetensors"], "goes with --weight_only_precision"),
    ],
)
def test_official_flags_refused(tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "in", rest(), None)
    assert main(["--model_dir", str(model), "--output_dir", str(tmp_path / "out"), *flags]) in (2, 4)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def modelopt(made: dict[str, Linear], group: int, inputs: bool) -> Tensors:
    tensors: Tensors = {}
    torch.manual_seed(2)
    shared = torch.rand(HIDDEN) + 0.5
    for name, one in made.items():
        path = f"model.layers.0.{name}."
        q = torch.from_numpy(one.u.T.copy()).to(torch.uint8)
        tensors[path + "weight"] = (q[0::2] & 15) | (q[1::2] << 4)
        tensors[path + "weight_scale"] = one.s.T.to(torch.float32)
        if inputs:
            k = one.u.shape[0]
            own = torch.rand(k) if name in ("self_attn.o_proj", "mlp.down_proj") else shared.clone()
            tensors[path + "pre_quant_scale"] = own.half()
    return tensors


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_modelopt_awq(tmp_path: Path, inputs: bool, tile_rows: int | None) -> None:
    tensors = rest() | modelopt(linears(4, 64), 64, inputs)
    model = write(tmp_path / "in", tensors, None)
    hf = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 64}}
    (model / "hf_quant_config.json").write_text(json.dumps(hf))
    options = TensorRTLLM(tp_size=2, quant="int4_awq", group_size=64, dtype="bfloat16")
    convert(model, tmp_path / "out", options, Resources(tile_rows=tile_rows))
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "W4A16_AWQ"
    assert quantization["pre_quant_scale"] is True and quantization["has_zero_point"] is False
    at = "model.layers.0."
    for rank in range(2):
        got = load_file(tmp_path / f"out/rank{rank}.safetensors")
        half = {name: tensors[f"{at}{name}.weight"].chunk(2, 0)[rank] for name in SHAPES}
        qkv = torch.cat([half[f"self_attn.{one}_proj"] for one in "qkv"])
        assert torch.equal(got["transformer.layers.0.attention.qkv.weight"], qkv.view(torch.int8))
        down = tensors[at + "mlp.down_proj.weight"].chunk(2, 1)[rank]
        assert torch.equal(got["transformer.layers.0.mlp.proj.weight"], down.view(torch.int8))
        scale = tensors[at + "mlp.down_proj.weight_scale"].chunk(2, 1)[rank]
        assert torch.equal(got["transformer.layers.0.mlp.proj.weights_scaling_factor"], scale)
        for name, full, part in (("attention.qkv", "self_attn.q_proj", 1), ("mlp.proj", "mlp.down_proj", 2)):
            k = SHAPES[full][1]
            own = tensors[f"{at}{full}.pre_quant_scale"] if inputs else torch.ones(k)
            wanted = own.to(torch.bfloat16).chunk(part)[rank if part == 2 else 0]
            assert torch.equal(got[f"transformer.layers.0.{name}.prequant_scaling_factor"], wanted)
    assert not verify(tmp_path / "out", model).problems


def test_modelopt_prequant_must_be_shared(tmp_path: Path) -> None:
    tensors = rest() | modelopt(linears(4, 64), 64, True)
    tensors["model.layers.0.self_attn.k_proj.pre_quant_scale"][5] += 1
    with pytest.raises(RefusedError, match="pre_quant_scale differs"):
        convert(write(tmp_path / "in", tensors, None), tmp_path / "out", TensorRTLLM(quant="int4_awq", group_size=64))


@pytest.mark.parametrize("algo", ["NVFP4", "W4A8_AWQ", "MIXED_PRECISION"])
def test_other_modelopt_exports_refused(tmp_path: Path, algo: str) -> None:
    model = write(tmp_path / "in", rest() | modelopt(linears(4, 64), 64, False), None)
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algo}}))
    with pytest.raises(RefusedError, match=f"modelopt {algo}"):
        convert(model, tmp_path / "out", TensorRTLLM())


def fbgemm(layers: int = 3) -> Tensors:
    torch.manual_seed(3)
    tensors = {name: tensor for name, tensor in rest().items() if "layers" not in name}
    for layer in range(layers):
        for norm in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{norm}_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
        for name, shape in SHAPES.items():
            path, weight = f"model.layers.{layer}.{name}.", torch.randn(shape)
            if name.startswith("mlp") and 0 < layer < layers - 1:
                tensors[path + "weight"] = weight.to(torch.float8_e4m3fn)
                tensors[path + "weight_scale"] = torch.rand(shape[0], 1)
            else:
                weight[3, 0], weight[3, -1] = 1100.0, -1100.0
                tensors[path + "weight"] = weight.to(torch.float16)
    return tensors


@pytest.mark.parametrize("recipe", [True, False])
def test_fbgemm(tmp_path: Path, recipe: bool) -> None:
    tensors = fbgemm()
    stated = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1000.0}
    model = write(tmp_path / "in", tensors, stated, num_hidden_layers=3)
    options = TensorRTLLM(tp_size=2, quant="fp8_rowwise", use_meta_fp8_rowwise_recipe=recipe)
    convert(model, tmp_path / "out", options, Resources(tile_rows=5))
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN" and quantization["clamp_val"] == [-1000.0, 1000.0]
    at, to = "model.layers.1.mlp.", "transformer.layers.1."
    for rank in range(2):
        got = load_file(tmp_path / f"out/rank{rank}.safetensors")
        gate, down = tensors[at + "gate_proj.weight"].chunk(2)[rank], tensors[at + "down_proj.weight"].chunk(2, 1)[rank]
        assert raw(got[to + "mlp.fc.weight"]) == raw(gate) and raw(got[to + "mlp.proj.weight"]) == raw(down)
        scale = tensors[at + "gate_proj.weight_scale"].chunk(2)[rank]
        assert torch.equal(got[to + "mlp.fc.per_channel_scale"], scale[:, 0])
        assert torch.equal(got[to + "mlp.proj.per_channel_scale"], tensors[at + "down_proj.weight_scale"][:, 0])
        assert got[to + "mlp.clamp_val"].tolist() == [-1000.0, 1000.0]
        assert (got[to + "attention.qkv.weight"].dtype == torch.float8_e4m3fn) is not recipe
        assert (to + "attention.clamp_val" in got) is not recipe
        if not recipe:  # not FP8 in the source: quantized, within the source's bound
            scale = got[to + "attention.dense.per_channel_scale"][3]
            assert scale.item() == pytest.approx(1000 / 448, rel=1e-6)
        assert (got["transformer.layers.0.mlp.fc.weight"].dtype == torch.float8_e4m3fn) is not recipe
    assert not verify(tmp_path / "out", model).problems


def test_fbgemm_weight_the_recipe_leaves_out(tmp_path: Path) -> None:
    tensors = fbgemm(2)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(WIDTH, HIDDEN).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.rand(WIDTH, 1)
    model = write(tmp_path / "in", tensors, {"quant_method": "fbgemm_fp8"}, num_hidden_layers=2)
    with pytest.raises(RefusedError, match=r"up_proj\.weight is FP8 already"):
        convert(model, tmp_path / "out", TensorRTLLM(quant="fp8_rowwise", use_meta_fp8_rowwise_recipe=True))


def test_hostile_statements(tmp_path: Path) -> None:
    model = write(tmp_path / "in", rest(), None)
    (model / "quantize_config.json").write_text("[1, 2")
    with pytest.raises(StreamconvError, match=r"quantize_config\.json"):
        convert(model, tmp_path / "out", TensorRTLLM())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["sm80", "sm90-0.16", "sm90"])
def test_kernel_is_its_definition(bits: int, family: str) -> None:
    half = 1 << (bits - 1)
    rows, cols, wide = 8, 192, 320
    q = np.random.RandomState(5).randint(-half, half, (rows, wide)).astype(np.int8)
    encoding = PackedWeight(F16, Layout(family, bits))
    kernel = encoding.kernel(I8)
    assert kernel is not None
    out = np.zeros(rows * cols * bits // 8, np.uint8)
    kernel(q.reshape(-1).view(np.uint8), 64, wide, rows, cols, [out])
    (wanted,) = encoding.encode(torch.from_numpy(q)[:, 64 : 64 + cols], EncodeStats())
    assert bytes(out) == bytes(wanted.numpy()) == processed(q[:, 64 : 64 + cols].T.astype(int), bits, family)
    back = encoding.decode([torch.from_numpy(out)], rows, cols)
    assert torch.equal(back, torch.from_numpy(q[:, 64 : 64 + cols].astype(np.float32)))


@pytest.mark.parametrize("stored", [F32, F16, BF16])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("bits", "shuffled", "middle"), [(4, False, 7), (4, True, 8), (8, False, 127), (8, False, 128)])
def test_group_scales_kernel_is_its_definition(stored: DType, dtype: DType, bits: int, shuffled: bool, middle: int) -> None:
    rows, n = 3, 24
    random = np.random.RandomState(7)
    zeros = torch.from_numpy(random.randint(0, 256, (rows, n * bits // 8)).astype(np.uint8))
    scales = torch.from_numpy((10.0 ** random.uniform(-9, 6, (rows, n))).astype(np.float32))
    scales[1, 3], scales[2, 5] = 0.0, float("inf")
    scales = scales.to(getattr(torch, stored.torch))
    rest = torch.full((rows, 7), 255, dtype=torch.uint8)  # other ranks' columns
    block = torch.cat([zeros, scales.view(torch.uint8), rest], 1)
    cols = block.shape[1] - 7
    encoding = GroupScales(dtype, stored, bits, shuffled, middle)
    kernel, stats, wanted_findings = encoding.kernel(U8), EncodeStats(), EncodeStats()
    assert kernel is not None
    outs = [np.zeros(part.nbytes(rows), np.uint8) for part in encoding.parts(rows, cols)]
    stats.add(kernel(block.reshape(-1).numpy(), 0, block.shape[1], rows, cols, outs))
    wanted = encoding.encode(block[:, :cols], wanted_findings)
    assert [bytes(out) for out in outs] == [bytes(one.numpy()) for one in wanted]
    assert stats == wanted_findings
    assert stats.overflow or stored != F32 or dtype != F16  # the case is worth its name


def test_paired_kernel_is_its_definition() -> None:
    q = np.random.RandomState(5).randint(-8, 8, (6, 40)).astype(np.int8)
    kernel, out = GivenIntegers("pairs", role="weight").kernel(I8), np.zeros(6 * 24 // 2, np.uint8)
    assert kernel is not None
    kernel(q.reshape(-1).view(np.uint8), 8, 40, 6, 24, [out])
    (wanted,) = GivenIntegers("pairs", role="weight").encode(torch.from_numpy(q)[:, 8:32], EncodeStats())
    assert bytes(out) == bytes(wanted.numpy())
    assert torch.equal(GivenIntegers("pairs", role="weight").decode([wanted], 6, 24), torch.from_numpy(q[:, 8:32].astype(np.float32)))
