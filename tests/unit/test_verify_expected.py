"""The tensors that config.json asks for: right for what NVIDIA's converter wrote, and every single deviation is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from streamconv.targets.trtllm.expected import check, expected
from tests.golden import cases

GOLDEN = cases.load()
Files = dict[str, dict[str, tuple[str, tuple[int, ...]]]]


def _files(case: str | cases.Case) -> Files:
    held = (GOLDEN[case] if isinstance(case, str) else case).files
    return {file: {key: (entry[0], tuple(entry[1])) for key, entry in what["tensors"].items()} for file, what in held.items()}


@pytest.mark.parametrize("case", [case for case in cases.every() if case.model], ids=str)
def test_every_golden_conversion_of_nvidia_is_as_expected(case: cases.Case) -> None:
    assert check(case.config, _files(case)) == ([], [])


# a format each, and what is special: pipeline, experts, padded vocabulary, biases, fused MLP, shared tables
VARIED = ["mha_tp2_pp2", "odd_tp2_paremb_dim0", "attnbias_int8_tp2", "mixtral_int4_tp2_ep2", "gptq_tp2", "gptq8_tp2", "phi3_tp1"]
VARIED += ["mha_sq_tensor_tp2", "gqa_sq_channel_token_tp2", "mha_fp8row_all_tp2", "mha_fp8row_meta_tp2", "gqa_int8_kv8_tp2"]
VARIED += ["gemma_int8_tp2", "qwen2_int8_tp2", "mha_tp2_fp8kv", "tied_tp2_share_paremb"]


@pytest.mark.parametrize("name", VARIED)
def test_every_tensor_counts(name: str) -> None:
    """Dropped, renamed, reshaped or of another dtype: each tensor of the first and the last rank, one at a time."""
    config, files = GOLDEN[name].config, _files(name)
    for file in {min(files), max(files)}:
        for tensor, (dtype, shape) in files[file].items():
            optional = tensor in cases.ROPE_TABLES or tensor.endswith("clamp_val")
            changed: list[tuple[str, dict[str, Any]]] = [
                ("renamed", {tensor + "_": (dtype, shape)}),
                ("reshaped", {tensor: (dtype, (*shape[:-1], shape[-1] + 1))}),
                ("flattened", {tensor: (dtype, (1, *shape))}),
                ("retyped", {tensor: ("F16" if dtype == "F32" else "F32", shape)}),
            ]
            for what, entry in [*changed, *([] if optional else [("dropped", {})])]:
                spoiled = copy.copy(files)
                spoiled[file] = {key: value for key, value in files[file].items() if key != tensor} | entry
                problems, _ = check(config, spoiled)
                assert any(problem.startswith(f"{file}: {tensor}") for problem in problems), (what, tensor, problems)


def test_the_tables_may_be_missing() -> None:
    files = _files("mha_tp1")
    bare = {file: {k: v for k, v in held.items() if k not in cases.ROPE_TABLES} for file, held in files.items()}
    assert bare != files and check(GOLDEN["mha_tp1"].config, bare) == ([], [])


def _with(name: str, **changes: Any) -> dict[str, Any]:
    return GOLDEN[name].config | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, "transformer.layers.4.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "transformer.layers.1.input_layernorm.weight is unexpected"),
        ({"vocab_size": 999}, "lm_head.weight has shape [512, 128], expected [999, 128] from config.json"),
        ({"dtype": "float16"}, "lm_head.weight has dtype BF16, expected F16 from config.json"),
        ({"intermediate_size": 512}, "mlp.fc.weight has shape"),
        ({"attn_bias": True}, "attention.qkv.bias is missing"),
        ({"mlp_bias": True}, "mlp.gate.bias is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a size"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"quantization": {"quant_algo": "W8A16_GPTQ", "group_size": 0}}, "group_size is 0"),
        ({"quantization": {"quant_algo": "FP8"}}, "attention.qkv.weights_scaling_factor is missing"),
        ({"quantization": {"quant_algo": "W4A16_AWQ", "pre_quant_scale": True}}, "prequant_scaling_factor is missing"),
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "kv_cache_scaling_factor is missing"),
    ],
)
def test_a_config_that_means_something_else(changes: dict[str, Any], words: str) -> None:
    problems, _ = check(_with("mha_tp1", **changes), _files("mha_tp1"))
    assert any(words in problem for problem in problems), problems


def test_what_is_not_known_is_said() -> None:
    files = _files("mha_tp1")
    problems, warnings = check(_with("mha_tp1", architecture="OtherForCausalLM"), files)
    assert not problems and "OtherForCausalLM" in warnings[0]
    problems, warnings = check(_with("mha_tp1", quantization={"quant_algo": "NVFP4"}), files)
    assert not problems and warnings == ["quant_algo NVFP4: the tensors of its linear layers are not checked"]


def test_raw_weights_are_quantized_when_they_are_loaded() -> None:
    """W8A16 in config.json and floating-point weights: legal."""
    raw = _with("mha_tp1", quantization={"quant_algo": "W8A16"})
    assert check(raw, _files("mha_tp1")) == ([], [])


def test_excluded_modules_stay_as_they_are() -> None:
    config = _with("mha_tp1", quantization={"quant_algo": "FP8", "exclude_modules": ["*.mlp.*", "*.attention.*"]})
    assert check(config, _files("mha_tp1")) == ([], [])


def test_uneven_stages_follow_1_2() -> None:
    config = _with("mha_tp1", num_hidden_layers=5, mapping={"world_size": 2, "tp_size": 1, "pp_size": 2})
    first, last = (sum("input_layernorm" in name for name in rank.fixed) for rank in expected(config).values())
    assert (first, last) == (3, 2)


ODD: list[Any] = ["x", "", -1, 0, 1, 1.5, True, None, [], [1], {}, {"a": 1}, 10**9, 10**30, "\ud800"]


@pytest.mark.parametrize("name", ["mha_sq_tensor_tp2", "mixtral_int4_tp2_ep2", "gptq_tp2", "mha_fp8row_meta_tp2", "qwen2_int8_tp2"])
def test_a_damaged_config_never_breaks_the_check(name: str) -> None:
    """Every value, one at a time, replaced by things that it cannot be: problems or none, but no other exception."""
    config, files = GOLDEN[name].config, _files(name)
    for key, value in config.items():
        for odd in ODD:
            check(config | {key: odd}, files)
            for inner in value if isinstance(value, dict) else ():
                check(config | {key: value | {inner: odd}}, files)
