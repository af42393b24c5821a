"""config.json of the golden models."""

from __future__ import annotations

from typing import Any

from tests.golden.random_numbers import Spec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "exaone": "ExaoneForCausalLM",
}


def hf_config(spec: Spec) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    arch = spec["arch"]
    head_dim = spec.get("head_dim", spec["hidden"] // spec["heads"])
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": spec["inter"],
        "max_position_embeddings": spec.get("max_pos", 64),
        "model_type": arch,
        "num_attention_heads": spec["heads"],
        "num_hidden_layers": spec["layers"],
        "num_key_value_heads": spec["kv"],
        "rms_norm_eps": spec.get("eps", 1e-05),
        "rope_theta": spec.get("theta", 10000.0),
        "tie_word_embeddings": bool(spec.get("tied", False)),
        "torch_dtype": spec["dtype"],
        "transformers_version": "4.46.3",
        "use_cache": True,
        "vocab_size": spec["vocab"],
    }
    if arch == "llama":
        config.update(
            attention_bias=bool(spec.get("attn_bias", False)),
            mlp_bias=False,
            pretraining_tp=1,
            rope_scaling=spec.get("rope_scaling"),
        )
    if arch in ("llama", "mistral") and "head_dim" in spec:
        config["head_dim"] = head_dim
    if arch in ("mistral", "mixtral"):
        config["sliding_window"] = spec.get("sliding_window")
    if arch == "mixtral":
        config.update(
            num_local_experts=spec["experts"],
            num_experts_per_tok=spec.get("topk", 2),
            output_router_logits=False,
            router_aux_loss_coef=0.02,
            router_jitter_noise=0.0,
        )
    if arch in ("qwen2", "qwen3", "qwen3_moe"):
        config.update(
            max_window_layers=spec["layers"],
            sliding_window=None,
            use_sliding_window=False,
            rope_scaling=spec.get("rope_scaling"),
        )
    if arch in ("qwen3", "qwen3_moe"):
        config.update(attention_bias=False, head_dim=head_dim)
    if arch == "qwen3_moe":
        config.update(
            num_experts=spec["experts"],
            num_experts_per_tok=spec.get("topk", 2),
            moe_intermediate_size=spec["moe_inter"],
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            output_router_logits=False,
            router_aux_loss_coef=0.001,
        )
    if arch in ("gemma", "gemma2"):
        config.update(
            attention_bias=False,
            head_dim=head_dim,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            pad_token_id=0,
        )
    if arch == "gemma2":
        config.update(query_pre_attn_scalar=head_dim, final_logit_softcapping=30.0, attn_logit_softcapping=50.0, sliding_window=32)
    if arch == "granite":
        config.update(
            attention_bias=False,
            mlp_bias=False,
            rope_scaling=spec.get("rope_scaling"),
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        )
    if arch == "internlm":
        config.update(bias=True, rotary={"base": 10000, "type": "dynamic"})
    if arch == "internlm2":
        config.update(bias=False, rope_scaling=spec.get("rope_scaling"), attn_implementation="eager")
    if arch == "exaone":
        config.update(
            activation_function="silu",
            layer_norm_epsilon=spec.get("eps", 1e-05),
            num_layers=spec["layers"],
            head_dim=head_dim,
            rope_scaling=spec.get("rope_scaling"),
            embed_dropout=0.0,
        )
        for key in ("hidden_act", "rms_norm_eps", "num_hidden_layers"):
            del config[key]
    if arch == "phi3":
        config.update(
            attention_bias=False,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=3,
            sliding_window=spec.get("sliding_window", 2047),
            original_max_position_embeddings=spec.get("max_pos", 64),
            rope_scaling=None,
        )
    config.update(spec.get("config", {}))  # the spec has the last word
    for key in spec.get("drop", []):
        del config[key]
    return {key: config[key] for key in sorted(config)}
