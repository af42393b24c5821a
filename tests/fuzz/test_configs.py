"""A config.json that says anything at all: the plan is made or refused by a streamconv error."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from streamconv import api
from streamconv.errors import StreamconvError
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 128, 1 << 20, 1 << 31, (1 << 40) - 1, 1 << 63, 10**400, 0.0, -0.0, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "128", "float16", "torch.bfloat16", "int8", "default", "llama3", "a\nb\x1b[31m", "é" * 5000),
    *([], [1], ["LlamaForCausalLM"], [[[]]], {}, {"type": "linear"}, {"rope_type": "llama3", "factor": 8.0}, {"factor": "x"}),
    *({"type": "yarn", "factor": None}, {"type": ["x"]}, {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": "4"}),
    *({"quant_method": ["gptq"]}, {"quant_method": "fp8", "weight_block_size": [0, 0]}, {"hidden_size": 128}, {"rope_theta": "x"}),
)
_KEYS = (
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "head_dim", "kv_channels", "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "quantization_config", "text_config"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "attention_bias", "mlp_bias", "bias"),
    *("rotary_pct", "logits_scaling", "query_pre_attn_scalar", "sliding_window", "layer_types", "partial_rotary_factor"),
    *("embedding_multiplier", "layer_norm_epsilon", "num_layers", "activation_function", "norm_topk_prob", "decoder_sparse_step"),
)
_CLASSES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("Phi3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "ExaoneForCausalLM", "GraniteForCausalLM", "InternLM2ForCausalLM"),
)
_OPTIONS = (
    TensorRTLLM(),
    TensorRTLLM(tp_size=2, quant="int8", target_sm=80, rope_tables=True),
    TensorRTLLM(quant="int4_awq", target_sm=80),
    TensorRTLLM(target_version="0.16", pp_size=2),
)


@pytest.mark.parametrize("seed", range(4))
def test_any_config(seed: int, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    random, made, refused = Random(seed), 0, 0
    for _ in range(500):
        config = tiny.config()
        if random.random() < 0.5:
            config["architectures"] = [random.choice(_CLASSES)]
        for key in random.sample(_KEYS, random.choice((1, 1, 2, 4))):
            config[key] = random.choice(_VALUES)
        (model / "config.json").write_text(json.dumps(config))
        try:
            index, _ = api.open_and_plan(model, random.choice(_OPTIONS))
        except StreamconvError as error:
            assert str(error).isprintable() and len(str(error)) < 8000, config
            refused += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} from {config}") from error
        else:
            index.close()
            made += 1
    assert made > 20 and refused > 100
