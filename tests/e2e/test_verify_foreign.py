"""`verify` on a checkpoint without our manifest: config.json alone says what must be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.cli.main import main
from streamconv.families import Family, all_families
from streamconv.verification.check import verify
from tests import tiny

FLAGS: dict[str, list[str]] = {
    "plain": ["--tp-size", "2", "--pp-size", "2"],
    "int8": ["--quant", "int8", "--target-sm", "80", "--tp-size", "2"],
    "raw": ["--quant", "int4", "--encoding", "raw"],
    "fp8_rowwise": ["--quant", "fp8_rowwise", "--kv-cache", "fp8"],
    "old": ["--target-version", "0.16", "--rope-tables", "--use-parallel-embedding", "--tp-size", "2"],
}


def _foreign(folder: Path, flags: list[str]) -> Path:
    """A conversion that another tool might have made."""
    out = folder / "out"
    assert main(["convert", str(tiny.write(folder / "model")), str(out), *flags, "-q"]) == 0
    (out / "streamconv.json").unlink()
    return out


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_good_one_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    out = _foreign(tmp_path, flags)
    assert main(["verify", str(out)]) == 0
    told = capsys.readouterr()
    assert "another tool wrote this" in told.err and "good" in told.out


FC = "transformer.layers.0.mlp.fc.weight"
Spoil = Callable[[dict[str, torch.Tensor]], Any]
SPOILS: dict[str, tuple[Spoil, str]] = {
    "dropped": (lambda t: t.pop(FC), f"{FC} is missing"),
    "renamed": (lambda t: t.update({"transformer.layers.0.mlp.fcc.weight": t.pop(FC)}), "mlp.fcc.weight is unexpected"),
    "cut": (lambda t: t.update({FC: t[FC][:-1].contiguous()}), f"{FC} has shape [127, 128], expected [128, 128] from config.json"),
    "retyped": (lambda t: t.update({FC: t[FC].float()}), f"{FC} has dtype F32, expected F16 from config.json"),
    "a norm kept in float32": (
        lambda t: t.update({"transformer.layers.0.post_layernorm.weight": t["transformer.layers.0.post_layernorm.weight"].float()}),
        "post_layernorm.weight has dtype F32",
    ),
    "surplus": (lambda t: t.update({"transformer.layers.9.mlp.fc.weight": t[FC].clone()}), "layers.9.mlp.fc.weight is unexpected"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILS.values(), ids=SPOILS)
def test_a_bad_one_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, words: str) -> None:
    out = _foreign(tmp_path, FLAGS["plain"])
    for name in ("rank0.safetensors", "rank1.safetensors"):
        tensors = load_file(out / name)
        spoil(tensors)
        save_file(tensors, out / name)
    assert main(["verify", str(out)]) == 7
    told = capsys.readouterr().err
    assert words in told and "rank0.safetensors" in told and "rank1.safetensors" in told


def test_quantized_bytes_under_the_wrong_type_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int8 weights without their scales, and uint8 in place of int8 (which the loader would quantize once more)."""
    out = _foreign(tmp_path, FLAGS["int8"])
    tensors = load_file(out / "rank0.safetensors")
    del tensors["transformer.layers.0.mlp.fc.per_channel_scale"]
    tensors[FC] = tensors[FC].view(torch.uint8)
    save_file(tensors, out / "rank0.safetensors")
    assert main(["verify", str(out)]) == 7
    told = capsys.readouterr().err
    assert "mlp.fc.per_channel_scale is missing" in told and f"{FC}: dtype U8" in told


MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": tiny.INTER}
EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": MOE | {"model_type": "mixtral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "qwen3_moe": MOE | {"model_type": "qwen3_moe", "head_dim": 32},
    "mistral": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64},
    "internlm": {"bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
}


def _weights(family: Family, settings: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """A tensor for every role of a family's table that this config calls for."""
    head = settings.get("head_dim", tiny.HIDDEN // tiny.HEADS)
    h, i, q, kv, v, e = tiny.HIDDEN, tiny.INTER, tiny.HEADS * head, tiny.KV * head, tiny.VOCAB, 4
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (v, h), "lm_head": (v, h), "final_norm": (h,), "input_norm": (h,), "post_norm": (h,),
        "pre_ffn_norm": (h,), "post_ffn_norm": (h,), "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q),
        "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (h,), "q_norm": (head,), "k_norm": (head,),
        "qkv": (q + 2 * kv, h), "qkv_grouped": (q + 2 * kv, h), "gate": (i, h), "up": (i, h), "down": (h, i),
        "gate_up": (2 * i, h), "gate_bias": (i,), "up_bias": (i,), "down_bias": (h,), "router": (e, h),
        "expert_gate": (i, h), "expert_up": (i, h), "expert_down": (h, i),
    }  # fmt: skip
    biased = family.qkv_bias or settings.get("bias") or settings.get("attention_bias")
    skip = set() if biased else {"q_bias", "k_bias", "v_bias", "o_bias"}
    skip |= {"experts_gate_up", "experts_down"} | (set() if settings.get("mlp_bias") else {"gate_bias", "up_bias", "down_bias"})
    if family.name.startswith("gemma"):
        skip.add("lm_head")
    random, made = np.random.default_rng(3), {}
    for role, (pattern, *_) in family.tensors.items():
        for layer in range(tiny.LAYERS if "{layer}" in pattern else 1):
            for expert in range(e if "{expert}" in pattern else 1):
                if role not in skip:
                    name = pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                    made[name] = random.normal(0, 0.05, shapes[role]).astype(np.float16)
    return made


@pytest.mark.parametrize("quant", [[], ["--quant", "int8", "--target-sm", "90"]], ids=["none", "int8"])
@pytest.mark.parametrize("family", [family for family in all_families() if family.architectures], ids=lambda family: family.name)
def test_every_family_is_what_its_config_says(tmp_path: Path, family: Family, quant: list[str]) -> None:
    """The planner and the loader's rules, written apart, agree."""
    settings = tiny.config(architectures=list(family.architectures), **EXTRA.get(family.name, {}))
    settings["tie_word_embeddings"] = family.name.startswith("gemma")
    model = tiny.write(tmp_path / "model", _weights(family, settings), settings)
    for version in family.versions:
        out = tmp_path / version
        assert main(["convert", str(model), str(out), "--tp-size", "2", "--target-version", version, *quant, "-q"]) == 0
        (out / "streamconv.json").unlink()
        assert verify(out).problems == []


@pytest.mark.parametrize("spoil", ['"tp_size": Infinity', '"tp_size": 1000000000', '"tp_size": -1', '"tp_size": "two"', '"pp_size": [1]'])
def test_a_damaged_mapping_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str) -> None:
    out = _foreign(tmp_path, [])
    text = (out / "config.json").read_text()
    key = spoil.split(":")[0]
    assert f"{key}: 1" in text
    (out / "config.json").write_text(text.replace(f"{key}: 1,", f"{spoil},", 1))
    assert main(["verify", str(out)]) == 7
    told = capsys.readouterr().err
    assert "config.json: mapping" in told and "Traceback" not in told
