"""config.json against whole files of NVIDIA's convert_checkpoint.py, and the spellings that sources use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv.checkpoint.model_config import ModelConfig, from_hf, from_meta
from streamconv.errors import CheckpointError, RefusedError
from streamconv.open_plan import open_and_plan
from streamconv.targets.trtllm.config_json import build_config, dump
from streamconv.targets.trtllm.config_sections import resolve_dtype
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
}
LLAMA_8B: dict[str, Any] = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MIXTRAL: dict[str, Any] = SIZES | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}


def _moe(experts: int = 0, top_k: int = 0, mode: int | None = None) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "shared_expert_intermediate_size": 0,
        "top_k": top_k,
        "normalization_mode": mode,
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    }


MAPPING_2X2 = {
    "world_size": 4,
    "gpus_per_node": 8,
    "cp_size": 1,
    "tp_size": 2,
    "pp_size": 2,
    "moe_tp_size": 2,
    "moe_ep_size": 1,
}
QUANTIZATION = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}
# in NVIDIA's order
EXAMPLE_016: dict[str, Any] = {
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_base": 500000.0,
    "rotary_scaling": LLAMA3,
    "residual_mlp": False,
    "disable_weight_only_quant_plugin": False,
    "moe": _moe(),
    "remove_duplicated_kv_heads": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "logits_dtype": "float32",
    "norm_epsilon": 1e-05,
    "runtime_defaults": None,
    "position_embedding_type": "rope_gpt_neox",
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mapping": MAPPING_2X2,
    "quantization": QUANTIZATION,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "share_embedding_table": False,
    "head_size": 128,
    "qk_layernorm": False,
    "rotary_embedding_dim": 128,
}


def _example_12() -> dict[str, Any]:
    """The same for 1.2."""
    made: dict[str, Any] = {}
    for key, value in EXAMPLE_016.items():
        if key == "architecture":
            names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "output_multiplier_scale")
            made |= {name: 1.0 for name in names} | {"has_partial_lora_mask": False}
        if key == "share_embedding_table":
            continue
        made[key] = value
    made["mapping"] = {
        "world_size": 4,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": 2,
        "pp_size": 2,
        "moe_tp_size": 2,
        "moe_cluster_size": 1,
        "moe_ep_size": 1,
        "attn_tp_size": -1,
        "attn_cp_size": -1,
        "cp_config": {},
        "enable_attention_dp": False,
        "enable_lm_head_tp_in_adp": False,
    }
    made["quantization"] = QUANTIZATION | {"mamba_ssm_cache_dtype": None}
    return made | {"tie_word_embeddings": False}


EXAMPLE_MIXTRAL = EXAMPLE_016 | {
    "rotary_base": 1000000.0,
    "rotary_scaling": None,
    "moe": _moe(8, 2, 1),
    "architecture": "MixtralForCausalLM",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_act": "swiglu",
    "max_position_embeddings": 32768,
    "mapping": MAPPING_2X2 | {"world_size": 2, "pp_size": 1},
}


def _written(source: dict[str, Any], options: TensorRTLLM) -> bytes:
    model = from_hf(source)
    return dump(build_config(model, options, dtype=resolve_dtype(options.dtype, model.dtype)))


@pytest.mark.parametrize(
    ("source", "options", "wanted"),
    [
        pytest.param(LLAMA_8B, TensorRTLLM(tp_size=2, pp_size=2, dtype="float16", target_version="0.16"), EXAMPLE_016, id="2.12"),
        pytest.param(LLAMA_8B, TensorRTLLM(tp_size=2, pp_size=2, dtype="float16"), _example_12(), id="2.13"),
        pytest.param(MIXTRAL, TensorRTLLM(tp_size=2, target_version="0.16"), EXAMPLE_MIXTRAL, id="2.14"),
    ],
)
def test_worked_examples(source: dict[str, Any], options: TensorRTLLM, wanted: dict[str, Any]) -> None:
    assert _written(source, options) == json.dumps(wanted, indent=4).encode()


def test_expert_parallelism_is_the_only_difference() -> None:
    made = json.loads(_written(MIXTRAL, TensorRTLLM(tp_size=2, moe_ep_size=2, target_version="0.16")))
    assert made == EXAMPLE_MIXTRAL | {"mapping": EXAMPLE_MIXTRAL["mapping"] | {"moe_tp_size": 1, "moe_ep_size": 2}}


LINEAR = {"type": "linear", "factor": 4.0}
SCALINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "absent": ({}, None),
    "null": ({"rope_scaling": None}, None),
    "old spelling gets rope_type last": ({"rope_scaling": LINEAR}, LINEAR | {"rope_type": "linear"}),
    "rope_type alone is kept": ({"rope_scaling": LLAMA3}, LLAMA3),
    "default means none": ({"rope_scaling": {"rope_type": "default"}}, None),
    "transformers 5": ({"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}, LLAMA3),
    "transformers 5, default": ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, None),
    "both: the old key wins": ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, LLAMA3),
}


@pytest.mark.parametrize(("keys", "wanted"), SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling(keys: dict[str, Any], wanted: Any) -> None:
    made = json.loads(_written(tiny.config(**keys), TensorRTLLM()))["rotary_scaling"]
    assert made == wanted and json.dumps(made) == json.dumps(wanted)  # the order too


def test_the_two_spellings_of_transformers_give_the_same_bytes() -> None:
    new = {key: value for key, value in LLAMA_8B.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "bfloat16", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    for version in ("0.16", "1.2"):
        options = TensorRTLLM(target_version=version)  # type: ignore[arg-type]
        assert _written(new, options) == _written(LLAMA_8B, options)


def test_torch_dtype_is_preferred_and_number_spelling_is_kept() -> None:
    mixed = tiny.config(torch_dtype="bfloat16", dtype="float32", rope_theta=1000000)
    text = _written(mixed, TensorRTLLM())
    assert b'"dtype": "bfloat16"' in text and b'"rotary_base": 1000000,' in text


@pytest.mark.parametrize(
    ("source", "asked", "wanted"),
    [
        (None, "auto", "float16"),
        ("float32", "auto", "float16"),
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float16", "bf16", "bfloat16"),
    ],
)
def test_dtype_inference(source: str | None, asked: str, wanted: str) -> None:
    assert resolve_dtype(asked, source) == wanted


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "max_position_embeddings": ({"max_position_embeddings": "2048"}, "max_position_embeddings is '2048'"),
    "max_position_embeddings 0": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "rms_norm_eps": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    "rms_norm_eps negative": ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    "num_local_experts": ({"num_local_experts": "eight"}, "num_local_experts is 'eight'"),
    "experts of a mixture": ({"architectures": ["MixtralForCausalLM"], "num_local_experts": -8}, "num_local_experts is -8"),
    "experts per token": ({"num_local_experts": 8, "num_experts_per_tok": 2.5}, "num_experts_per_tok is 2.5"),
    "moe_intermediate_size": ({"moe_intermediate_size": [768]}, "moe_intermediate_size is [768]"),
    "hidden_act": ({"hidden_act": 3}, "hidden_act is 3"),
    "tie_word_embeddings": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    "attention_bias": ({"attention_bias": "no"}, "attention_bias is 'no'"),
    "logits_scaling": ({"logits_scaling": "16"}, "logits_scaling is '16'"),
}


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD)
def test_a_bad_value_is_named_and_never_replaced(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_hf(tiny.config(**keys))
    assert message in str(caught.value)


@pytest.mark.parametrize("act", ["x", None])
def test_an_activation_that_the_loader_does_not_know(tmp_path: Path, act: str | None) -> None:
    with pytest.raises(RefusedError, match="hidden_act is"):
        open_and_plan(tiny.write(tmp_path / "in", settings=tiny.config(hidden_act=act)), TensorRTLLM())


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        from_hf(tiny.config(hidden_size=0, rms_norm_eps="x", max_position_embeddings=None, vocab_size=True, mlp_bias=1))
    for key in ("hidden_size", "rms_norm_eps", "vocab_size", "mlp_bias"):
        assert key in str(caught.value)


def test_meta_params() -> None:
    """The sizes that Meta's params.json means."""
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}
    model = from_meta(params | {"norm_eps": 1e-05, "vocab_size": -1, "use_scaled_rope": True})
    assert (model.intermediate_size, model.vocab_size, model.max_position_embeddings) == (14336, 32000, 2048)
    assert from_meta({"dim": 128, "n_layers": 1, "n_heads": 4, "multiple_of": 64, "norm_eps": 1e-06}).intermediate_size == 384
    text = dump(build_config(model, TensorRTLLM(target_version="0.16"), dtype="bfloat16"))
    assert b'"rotary_base": 10000,' in text and b"tie_word" not in text
    made = json.loads(text)
    assert made["rotary_scaling"] == {"type": "llama3"} and made["moe"]["normalization_mode"] == 1


def test_a_language_model_inside_a_larger_config() -> None:
    inner = {key: value for key, value in tiny.config().items() if key != "architectures"}
    model: ModelConfig = from_hf({"architectures": ["LlamaForCausalLM"], "text_config": inner})
    assert model.hidden_size == tiny.HIDDEN
