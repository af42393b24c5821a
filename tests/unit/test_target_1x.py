"""What TensorRT-LLM 1.x wants otherwise than 0.16, for models that no golden case has."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamconv import api
from streamconv.checkpoint.model_config import from_hf
from streamconv.cli.convert_checkpoint import main as official
from streamconv.cli.main import main
from streamconv.errors import CheckpointError, RefusedError
from streamconv.families import family_of
from streamconv.targets.trtllm.checks import refusals
from streamconv.targets.trtllm.config_json import build_config
from streamconv.targets.trtllm.config_sections import resolve_moe
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny
from tests.golden import generate

QWEN_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
PHI3: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
LONG: dict[str, Any] = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
LATE = {"cp_config", "enable_attention_dp", "enable_lm_head_tp_in_adp"}


def config(options: TensorRTLLM | None = None, *, calibrated: bool = False, **keys: Any) -> dict[str, Any]:
    model = from_hf(tiny.config(**keys))
    chosen = options or TensorRTLLM()
    return build_config(
        model, chosen, config_class=family_of(model.architecture).config_class, dtype="bfloat16", calibrated=calibrated
    )


def refused(options: TensorRTLLM, **keys: Any) -> list[str]:
    model = from_hf(tiny.config(**keys))
    return refusals(model, family_of(model.architecture), options, model.num_key_value_heads, resolve_moe(options))


def golden(name: str, out: Path, **changes: Any) -> Path:
    """A golden model with other keys in its config.json."""
    spec = next(spec for spec in generate.load_specs() if spec["name"] == name)
    generate.generate(spec, out)
    path = out / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out / name


# ---- Phi-3 (cases g01, g02)


@pytest.mark.parametrize(
    "keys", [{"partial_rotary_factor": 0.75}, {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 10000.0}}], ids=str
)
def test_part_of_each_head_of_phi3_is_rotated(keys: dict[str, Any]) -> None:
    made = config(**PHI3, **LONG, tie_word_embeddings=True, **keys)
    assert (made["rotary_pct"], made["rotary_embedding_dim"], made["head_size"]) == (0.75, 24, 32)
    order = list(made)
    assert order[order.index("rotary_embedding_dim") + 1 :][:3] == ["rotary_pct", "tie_word_embeddings", "original_max_position_embeddings"]
    assert any("partial_rotary_factor 0.75" in problem for problem in refused(TensorRTLLM(target_version="0.16"), **PHI3, **keys))
    assert not refused(TensorRTLLM(), **PHI3, **keys)


@pytest.mark.parametrize("version", ["1.0", "1.2"])
def test_every_phi3_has_the_keys_the_loader_fails_without(version: Any) -> None:
    made = config(TensorRTLLM(target_version=version), **PHI3)
    assert made["rotary_pct"] == 1.0 and made["tie_word_embeddings"] is False
    assert "rotary_pct" not in config(TensorRTLLM(target_version="0.16"), **PHI3)


def test_phi4_mini_converts_and_verifies(tmp_path: Path) -> None:
    model = golden("phi4_mini", tmp_path)
    api.convert(model, tmp_path / "out", TensorRTLLM(tp_size=2))
    assert not verify(tmp_path / "out", model).problems
    with pytest.raises(RefusedError, match=r"rotates whole heads of Phi-3; use --target-version 1\.2"):
        api.convert(model, tmp_path / "old", TensorRTLLM(target_version="0.16"))


@pytest.mark.parametrize("value", [0, 1.5, -0.5, "0.75", True])
def test_a_rotary_factor_that_cannot_be(value: Any) -> None:
    with pytest.raises(CheckpointError, match="partial_rotary_factor is"):
        from_hf(tiny.config(**PHI3, partial_rotary_factor=value))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GraniteForCausalLM", "ExaoneForCausalLM"])
def test_other_families_rotate_whole_heads(architecture: str) -> None:
    made = config(architectures=[architecture], rotary_pct=0.5, partial_rotary_factor=0.5)
    assert made["rotary_embedding_dim"] == made["head_size"] == 32 and "rotary_pct" not in made


def test_a_rotary_factor_that_is_dropped_is_told_of(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", settings=tiny.config(partial_rotary_factor=0.5))
    index, plan = api.open_and_plan(model, TensorRTLLM())
    index.close()
    assert any("partial_rotary_factor 0.5 is dropped" in line for line in plan.warnings)


# ---- Qwen (cases g06, g09)


@pytest.mark.parametrize(("stated", "mode"), [({"norm_topk_prob": True}, 1), ({"norm_topk_prob": False}, 0), ({}, 0)], ids=str)
def test_expert_weights_are_normalized_where_the_model_says_so(stated: dict[str, Any], mode: int) -> None:
    assert config(**QWEN_MOE, **stated)["moe"]["normalization_mode"] == mode


def test_a_dense_model_has_no_normalization() -> None:
    assert config(architectures=["Qwen2ForCausalLM"], norm_topk_prob=True)["moe"]["normalization_mode"] == 0


@pytest.mark.parametrize(
    ("keys", "fine"), [({"mlp_only_layers": [1]}, False), ({"decoder_sparse_step": 2}, False), ({"mlp_only_layers": [9]}, True)]
)
def test_layers_without_experts_are_refused(keys: dict[str, Any], fine: bool) -> None:
    assert fine == (not any("without experts" in problem for problem in refused(TensorRTLLM(), **QWEN_MOE, **keys)))
    made = config(**QWEN_MOE, **keys)
    assert (made["mlp_only_layers"], made["decoder_sparse_step"]) == (keys.get("mlp_only_layers", []), keys.get("decoder_sparse_step", 1))


@pytest.mark.parametrize(
    "keys", [{"mlp_only_layers": 3}, {"mlp_only_layers": ["1"]}, {"decoder_sparse_step": 0}, {"norm_topk_prob": 1}], ids=str
)
def test_bad_keys_of_a_mixture_are_named(keys: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(keys))} is"):
        from_hf(tiny.config(**QWEN_MOE, **keys))


def test_qwen2_keys_of_1x() -> None:
    keys: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_logn_attn": True}
    keys["shared_expert_intermediate_size"] = 96
    made = config(**keys)
    assert made["use_logn_attn"] is True and made["moe_shared_expert_intermediate_size"] == 96
    assert made["moe"]["shared_expert_intermediate_size"] == 0
    order = list(made)
    assert order[5:10] == ["num_labels", "use_logn_attn", "mlp_only_layers", "decoder_sparse_step", "moe"]
    assert "mlp_only_layers" not in config(TensorRTLLM(target_version="1.0"), **keys)
    assert "use_logn_attn" not in config(TensorRTLLM(target_version="0.16"), **keys)


def test_the_base_of_qwen_is_its_class_default() -> None:
    keys = tiny.config(architectures=["Qwen2ForCausalLM"])
    del keys["rope_theta"]
    model = from_hf(keys)
    assert build_config(model, TensorRTLLM(), config_class="qwen", dtype="float16")["rotary_base"] == 10000.0


def test_a_head_size_that_0_16_does_not_see_is_refused() -> None:
    keys: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 64}
    assert any("head_dim 64 is not" in problem for problem in refused(TensorRTLLM(target_version="0.16"), **keys))
    assert not refused(TensorRTLLM(), **keys) and config(**keys)["head_size"] == 64
    assert not refused(TensorRTLLM(target_version="0.16"), **(keys | {"head_dim": 32}))


# ---- rope_type, activation, group size, sizes of attention


@pytest.mark.parametrize(("architecture", "added"), [
    ("LlamaForCausalLM", True), ("Qwen2ForCausalLM", True), ("Qwen3ForCausalLM", True), ("Qwen3MoeForCausalLM", True),
    ("MistralForCausalLM", False), ("MixtralForCausalLM", False), ("ExaoneForCausalLM", False), ("InternLM2ForCausalLM", False),
])  # fmt: skip
def test_rope_type_is_added_where_transformers_adds_it(architecture: str, added: bool) -> None:
    keys: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2} if "Moe" in architecture else {}
    scaling = {"type": "linear", "factor": 2.0}
    made = config(architectures=[architecture], rope_scaling=scaling, **keys)["rotary_scaling"]
    assert json.dumps(made) == json.dumps(scaling | ({"rope_type": "linear"} if added else {}))


@pytest.mark.parametrize(("architecture", "act"), [("GemmaForCausalLM", "gelu_pytorch_tanh"), ("Gemma2ForCausalLM", "gelu")])
@pytest.mark.parametrize("version", ["0.16", "1.2"])
def test_the_activation_of_gemma_where_none_is_stated(architecture: str, act: str, version: Any) -> None:
    keys = tiny.config(architectures=[architecture], head_dim=32)
    del keys["hidden_act"]
    options = TensorRTLLM(target_version=version, quant="int4", target_sm=80)
    made = build_config(from_hf(keys), options, config_class="gemma", dtype="float16")
    assert made["hidden_act"] == act and made["quantization"]["pre_quant_scale"] is True


@pytest.mark.parametrize("version", ["0.16", "1.2"])
@pytest.mark.parametrize(("quant", "group"), [("int8", 128), ("int4", 128), ("fp8_rowwise", 128), ("none", 128), ("int4_gptq", 64)])
def test_the_group_size_is_told_of_formats_with_groups(quant: str, group: int, version: Any) -> None:
    made = config(TensorRTLLM(quant=quant, group_size=64, target_version=version))
    assert made["quantization"]["group_size"] == group


@pytest.mark.parametrize(("keys", "calibrated", "sizes"), [
    ({}, False, (-1, -1)), ({}, True, (2, 1)), (PHI3, False, (2, 1)),
    ({"architectures": ["GemmaForCausalLM"]}, False, (2, 1)), ({"architectures": ["Qwen2ForCausalLM"]}, True, (2, 1)),
])  # fmt: skip
def test_sizes_of_attention(keys: dict[str, Any], calibrated: bool, sizes: tuple[int, int]) -> None:
    made = config(TensorRTLLM(tp_size=2), calibrated=calibrated, **keys)["mapping"]
    assert (made["attn_tp_size"], made["attn_cp_size"]) == sizes
    assert "attn_tp_size" not in config(TensorRTLLM(tp_size=2, target_version="0.16"), calibrated=calibrated, **keys)["mapping"]


# ---- early and late 1.x


def test_an_early_release_gets_what_it_knows() -> None:
    late, early = config(), config(TensorRTLLM(target_version="1.0"))
    assert set(late["mapping"]) - set(early["mapping"]) == LATE
    assert set(late["quantization"]) - set(early["quantization"]) == {"mamba_ssm_cache_dtype"}
    assert {**late, "mapping": 0, "quantization": 0} == {**early, "mapping": 0, "quantization": 0}
    assert early["mapping"]["attn_tp_size"] == -1 and "share_embedding_table" not in early


def test_both_have_the_same_weights(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    versions: tuple[Any, ...] = ("1.0", "1.2")
    for version in versions:
        options = TensorRTLLM(target_version=version, quant="int4", target_sm=90)
        api.convert(model, tmp_path / version, options)
        assert not verify(tmp_path / version, model).problems
    assert len({(tmp_path / version / "rank0.safetensors").read_bytes() for version in versions}) == 1


def test_the_plan_says_which_keys_an_early_release_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny.write(tmp_path / "model"))
    assert main(["plan", model]) == 0
    told = capsys.readouterr().out
    for key in (*(f"mapping.{key}" for key in LATE), "quantization.mamba_ssm_cache_dtype", "--target-version 1.0"):
        assert key in told
    for version in ("1.0", "0.16"):
        assert main(["plan", model, "--json", "--target-version", version]) == 0
        assert json.loads(capsys.readouterr().out)["notes"] == []


# ---- FP8 KV cache


@pytest.mark.parametrize(("version", "held"), [("0.16", False), ("1.0", True), ("1.2", True)])
def test_the_reciprocal_factor(tmp_path: Path, version: Any, held: bool) -> None:
    model = tiny.write(tmp_path / "model")
    index, plan = api.open_and_plan(model, TensorRTLLM(kv_cache="fp8", target_version=version))
    index.close()
    names = {name for name in plan.files[0].names() if "scaling_factor" in name}
    assert len(names) == len(plan.constants) == tiny.LAYERS * (2 if held else 1)
    assert {constant.data for constant in plan.constants} == {struct.pack("<f", 1.0)}


def test_the_reciprocal_of_a_measured_factor(tmp_path: Path) -> None:
    model, ranges = tiny.write(tmp_path / "model"), {}
    for layer in range(tiny.LAYERS):
        for side in "kv":
            ranges[f"model.layers.{layer}.self_attn.{side}_proj.y"] = np.full(tiny.KV * 32, 448.0 * 3, np.float32)
    save_file(ranges, tmp_path / "ranges.safetensors")
    api.convert(model, tmp_path / "out", TensorRTLLM(kv_cache="fp8", activation_ranges=str(tmp_path / "ranges.safetensors")))
    made = load_file(tmp_path / "out" / "rank0.safetensors")
    assert made["transformer.layers.1.attention.kv_cache_scaling_factor"] == np.float32(3)
    assert made["transformer.layers.1.attention.kv_cache_rcp_scaling_factor"] == np.float32(1) / np.float32(3)
    assert not verify(tmp_path / "out", model).problems


# ---- context parallelism


@pytest.mark.parametrize(("options", "keys", "words"), [
    ({"quant": "smoothquant"}, {}, "--quant smoothquant cannot be combined"),
    ({"kv_cache": "int8"}, {}, "--kv-cache int8 cannot be combined"),
    ({}, {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    ({}, QWEN_MOE, "mixture of experts"),
    ({"target_version": "0.16"}, {}, "--target-version 1.0 or 1.2"),
    ({}, {"architectures": ["InternLM2ForCausalLM"]}, "no place for it"),
])  # fmt: skip
def test_context_parallelism_is_refused(options: dict[str, Any], keys: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in refused(TensorRTLLM(cp_size=2, **options), **keys))
    assert not any(words in problem for problem in refused(TensorRTLLM(**options), **keys))


def test_a_meta_checkpoint_has_no_context_parallelism(tmp_path: Path) -> None:
    model = golden_meta(tmp_path)
    with pytest.raises(RefusedError, match="Meta checkpoint cannot be converted for context parallelism"):
        api.convert(model, tmp_path / "out", TensorRTLLM(cp_size=2))


def golden_meta(out: Path) -> Path:
    generate.generate(next(spec for spec in generate.load_specs() if spec["name"] == "meta_2shard"), out)
    return out / "meta_2shard"


# ---- the default dtype of InternLM2's script


def test_internlm2_is_float16_unless_a_dtype_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = golden("internlm2_gqa", tmp_path)
    for number, (flags, dtype) in enumerate([([], "float16"), (["--dtype", "auto"], "bfloat16"), (["--dtype", "float32"], "float32")]):
        out = tmp_path / f"out{number}"
        assert official(["--model_dir", str(model), "--output_dir", str(out), "--save_config_only", *flags]) == 0
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        assert ("--dtype float16" in capsys.readouterr().err) == (not flags)
