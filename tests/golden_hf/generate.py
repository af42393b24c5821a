"""Tiny random Hugging Face models with awkward rows, always the same bytes for the same spec; and FP8 sources made of them.

`models.json` describes the models. A generator that drifts is found by the digest in the spec, and not as hundreds of wrong hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.generate import digest
from tests.golden.random_numbers import DTYPES, Spec, Tensors, random_tensor
from tests.golden_hf.hf_config import hf_config

MODELS = Path(__file__).with_name("models.json")
_E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.125)
_MX_BORDERS = (1.0, 1.25, 1.5, 1.75, 1.7421875, 1.7578125, 1.9921875, 1.4921875)
Add = Callable[..., None]


def load_specs() -> dict[str, Spec]:
    """Name -> spec."""
    return {spec["name"]: spec for spec in json.loads(MODELS.read_text())}


def _awkward(module: str, w: torch.Tensor) -> None:
    """Rows that show which rule a format follows; by powers of two, so that BF16, F16 and F32 all hold them exactly."""
    k = torch.arange(w.shape[1])
    sign = (1 - 2 * (k % 2)).float()
    if module in ("q_proj", "gate_proj", "w1", "q_a_proj", "down_proj"):
        w.clamp_(-5, 5)
        w[1, w.shape[1] // 2] = 5.25  # 2688 / amax is 512
    if module in ("up_proj", "w3", "v_proj", "kv_b_proj"):
        w[3] = 0.0
        w[4, : w.shape[1] // 2] = 0.0
    w[5] = ((2 * (k % 8) + 1).float() / 64.0) * sign  # INT4: the scale is 1/32, every value a tie
    w[5, 0] = 15 / 64.0
    w[6] = ((16 + (k % 16)) / 32.0 * torch.pow(2.0, -(k % 11).float())) * sign  # E4M3 ties: the scale is 1/256
    w[6, 0::128] = 1.75
    if module in ("o_proj", "k_proj", "w2", "lm_head"):
        w[7] *= 2.0**-18  # nearly underflows
    w[8] = torch.tensor(_E2M1_TIES)[k % 8] / 128.0 * sign
    w[8, 0::16] = 6 / 128.0
    w[9] = 2.0**-9 * sign
    w[9, 3::16] = (torch.tensor(_MX_BORDERS)[(k // 16) % 8] * torch.pow(2.0, -(k // 16 % 5).float()) / 4)[3::16]
    w[10] = ((2 * (k % 120) + 1).float() / 256.0) * sign  # INT8 ties
    w[10, 0] = 255 / 256.0


def _make(spec: Spec, key: str, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    seed = spec["seed"]
    if kind == "float32":
        return random_tensor(seed, key, shape, 0.1)
    std = {"norm": 0.15, "bias": 0.3, "embedding": 0.6}.get(kind, spec.get("std", 0.05))
    w = random_tensor(seed, key, shape, std) + (1.0 if kind == "norm" else 0.0)
    if kind == "linear":
        if spec.get("quirks", True) and w.dim() == 2 and min(w.shape) >= 16:
            _awkward(key.rsplit(".", 2)[-2], w)
        if any(part in key for part in spec.get("zero", ())):
            w.zero_()
    return w.to(DTYPES[spec["dtype"]]).contiguous()


def _attention(spec: Spec, at: str, add: Add) -> None:
    hidden, heads = spec["hidden"], spec["heads"]
    if spec["arch"] == "deepseek_v3":
        add(at + "q_a_proj.weight", (spec["q_lora"], hidden))
        add(at + "q_a_layernorm.weight", (spec["q_lora"],), "norm")
        add(at + "q_b_proj.weight", (heads * (spec["nope"] + spec["rope"]), spec["q_lora"]))
        add(at + "kv_a_proj_with_mqa.weight", (spec["kv_lora"] + spec["rope"], hidden))
        add(at + "kv_a_layernorm.weight", (spec["kv_lora"],), "norm")
        add(at + "kv_b_proj.weight", (heads * (spec["nope"] + spec["v_dim"]), spec["kv_lora"]))
        add(at + "o_proj.weight", (hidden, heads * spec["v_dim"]))
        return
    size = spec.get("head_dim", hidden // heads)
    for name, count in (("q", heads), ("k", spec["kv"]), ("v", spec["kv"])):
        add(at + f"{name}_proj.weight", (count * size, hidden))
        if spec["arch"] == "qwen2":
            add(at + f"{name}_proj.bias", (count * size,), "bias")
    if spec["arch"] in ("qwen3", "qwen3_moe"):
        add(at + "q_norm.weight", (size,), "norm")
        add(at + "k_norm.weight", (size,), "norm")
    add(at + "o_proj.weight", (hidden, heads * size))


def _mlp(spec: Spec, at: str, layer: int, add: Add, made: Tensors) -> None:
    arch, hidden, inter = spec["arch"], spec["hidden"], spec["inter"]

    def gated(module: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        for name, shape in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
            add(f"{module}{name}.weight", shape)

    if arch == "mixtral":
        add(at + "block_sparse_moe.gate.weight", (spec["experts"], hidden), "embedding")
        for expert in range(spec["experts"]):
            gated(at + f"block_sparse_moe.experts.{expert}.", inter, ("w1", "w3", "w2"))
        return
    if arch not in ("qwen3_moe", "deepseek_v3") or (arch == "deepseek_v3" and layer == 0):
        gated(at + "mlp.", inter)
        return
    width = spec.get("moe_inter", inter)
    add(at + "mlp.gate.weight", (spec["experts"], hidden), "embedding")
    if arch == "deepseek_v3":
        add(at + "mlp.gate.e_score_correction_bias", (spec["experts"],), "float32")
    experts = [at + f"mlp.experts.{expert}." for expert in range(spec["experts"])]
    for module in experts + ([at + "mlp.shared_experts."] if arch == "deepseek_v3" else []):
        gated(module, width)
    if spec.get("stacked"):
        pairs = [torch.cat([made.pop(e + "gate_proj.weight"), made.pop(e + "up_proj.weight")]) for e in experts]
        down = [made.pop(e + "down_proj.weight") for e in experts]
        made[at + "mlp.experts.gate_up_proj"], made[at + "mlp.experts.down_proj"] = torch.stack(pairs), torch.stack(down)


def _tensors(spec: Spec) -> Tensors:
    made: Tensors = {}

    def add(key: str, shape: tuple[int, ...], kind: str = "linear") -> None:
        made[key] = _make(spec, key, shape, kind)

    add("model.embed_tokens.weight", (spec["vocab"], spec["hidden"]), "embedding")
    for layer in range(spec["layers"]):
        at = f"model.layers.{layer}."
        add(at + "input_layernorm.weight", (spec["hidden"],), "norm")
        _attention(spec, at + "self_attn.", add)
        add(at + "post_attention_layernorm.weight", (spec["hidden"],), "norm")
        _mlp(spec, at, layer, add, made)
    add("model.norm.weight", (spec["hidden"],), "norm")
    if not spec.get("tied"):
        add("lm_head.weight", (spec["vocab"], spec["hidden"]))
    return _in_fp8(made) if spec.get("source") == "fp8_block" else made


def _in_fp8(tensors: Tensors) -> Tensors:
    """DeepSeek's form: e4m3 codes, and a float32 multiplier for each tile of 128 x 128."""
    made: Tensors = {}
    for key, weight in tensors.items():
        if not key.endswith(("_proj.weight", "proj_with_mqa.weight")):
            made[key] = weight
            continue
        rows, cols = weight.shape
        down, across = -(-rows // 128), -(-cols // 128)
        padded = torch.zeros(down * 128, across * 128)
        padded[:rows, :cols] = weight.float()
        tiles = padded.reshape(down, 128, across, 128)
        scale = tiles.abs().amax((1, 3)).clamp_min(1e-12) / 448.0
        codes = (tiles / scale[:, None, :, None]).clamp(-448, 448).reshape(padded.shape)[:rows, :cols]
        made[key], made[key + "_scale_inv"] = codes.contiguous().to(torch.float8_e4m3fn), scale.contiguous()
    return made


def generate(spec: Spec, root: Path) -> Path:
    """Write one model into a folder of its own below `root`.

    Raises:
        AssertionError: the tensors are not those that the right answers are for.
    """
    out = root / spec["name"]
    out.mkdir(parents=True)
    tensors = _tensors(spec)
    assert digest(tensors) == spec["digest"], f"{spec['name']}: the generator makes other tensors"
    for name, content in (("config.json", hf_config(spec)), ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    count = spec.get("shards", 1)
    if count == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out
    keys = list(tensors)
    each = -(-len(keys) // count)
    parts = [keys[i::count] if spec.get("scatter") else keys[i * each : (i + 1) * each] for i in range(count)]
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensors[key] for key in part}, out / name, metadata={"format": "pt"})
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return out
