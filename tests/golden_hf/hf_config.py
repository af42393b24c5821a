"""config.json of the golden models."""

from __future__ import annotations

from typing import Any

from tests.golden.random_numbers import Spec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def hf_config(spec: Spec) -> dict[str, Any]:
    """config.json as transformers 4.57 wrote it."""
    arch = spec["arch"]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": spec["inter"],
        "max_position_embeddings": 64,
        "model_type": arch,
        "num_attention_heads": spec["heads"],
        "num_hidden_layers": spec["layers"],
        "num_key_value_heads": spec["kv"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": bool(spec.get("tied")),
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": spec["vocab"],
        spec.get("dtype_key", "torch_dtype"): spec["dtype"],
    }
    if arch not in ("qwen2", "deepseek_v3"):
        config["head_dim"] = spec.get("head_dim", spec["hidden"] // spec["heads"])
    if arch == "llama":
        config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    if arch == "qwen2":
        config |= {"max_window_layers": spec["layers"], "sliding_window": None, "use_sliding_window": False}
    if arch in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if arch == "mixtral":
        config |= {"num_local_experts": spec["experts"], "num_experts_per_tok": 2, "output_router_logits": False}
        config |= {"router_aux_loss_coef": 0.02, "sliding_window": None}
    if arch == "qwen3_moe":
        config |= {"num_experts": spec["experts"], "num_experts_per_tok": 2, "moe_intermediate_size": spec["inter"]}
        config |= {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
    if arch == "deepseek_v3":
        config |= {"q_lora_rank": spec["q_lora"], "kv_lora_rank": spec["kv_lora"], "qk_nope_head_dim": spec["nope"]}
        config |= {"qk_rope_head_dim": spec["rope"], "v_head_dim": spec["v_dim"], "n_routed_experts": spec["experts"]}
        config |= {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"}
        config |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_intermediate_size": spec["moe_inter"]}
        config |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "attention_bias": False}
        config["num_nextn_predict_layers"] = 0
    if spec.get("source") == "fp8_block":
        blocks = {"weight_block_size": [128, 128]}
        config["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"} | blocks
    return {key: config[key] for key in sorted(config)}
