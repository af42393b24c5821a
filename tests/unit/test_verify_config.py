"""`verify --source` of a folder without streamconv.json: a config.json that makes the engine compute another model is a problem."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv import api
from streamconv.targets.hf.check import config_differences
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

Config = dict[str, Any]
NEW = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
SOURCE = tiny.config(
    attn_logit_softcapping=50.0, num_experts_per_tok=2, rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0}, head_dim=None,
    sliding_window=4096, use_sliding_window=False, pad_token_id=None, vision_config={"patch_size": 14},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(rope_theta=5e5), "rope.rope_theta is 500000.0, and 1000000.0 in the source"),
        (lambda c: c["rope_scaling"].update(factor=8.0), "rope.factor is 8.0, and 4.0"),
        (lambda c: c.pop("rope_scaling"), 'rope.type is "default", and "yarn"'),
        (lambda c: c.update(rope_scaling=None, rope_parameters={**NEW, "rope_theta": 1e4}), "rope.rope_theta is 10000.0"),
        (lambda c: c.update(attn_logit_softcapping=None), "attn_logit_softcapping is null, and 50.0"),
        (lambda c: c.update(num_experts_per_tok=1), "num_experts_per_tok is 1, and 2"),
        (lambda c: c.update(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, and 1e-05"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is true, and false"),
        (lambda c: c["vision_config"].update(patch_size=16), "vision_config.patch_size is 16, and 14"),
        (lambda c: c.update(architectures=["MistralForCausalLM"]), "architectures"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_other_values_are_named(change: Callable[[Config], object], says: str, wrapped: bool) -> None:
    config = copy.deepcopy(SOURCE)
    change(config)
    source = {"model_type": "llava", "text_config": SOURCE} if wrapped else SOURCE
    problems, _ = config_differences({"model_type": "llava", "text_config": config} if wrapped else config, source)
    assert len(problems) == 1 and says in problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(transformers_version="5.0", dtype="float16", use_cache=False, _name_or_path="x", quantization_config={"a": 1}),
        lambda c: (c.pop("rope_theta"), c.pop("rope_scaling"), c.update(rope_parameters=NEW, layer_types=["full_attention"])),
        lambda c: c.update(head_dim=32, pad_token_id=0, sliding_window=None, attention_dropout=0.1),
        lambda c: (c.pop("head_dim"), c.update(rope_theta=1000000)),
    ],
)
def test_what_tools_change_is_no_problem(change: Callable[[Config], object]) -> None:
    config = copy.deepcopy(SOURCE)
    change(config)
    assert config_differences(config, SOURCE) == ([], []) == config_differences(config, {"text_config": SOURCE, "model_type": "llava"})


def test_what_the_source_alone_has_is_told() -> None:
    problems, (line,) = config_differences({key: value for key, value in SOURCE.items() if key != "rms_norm_eps"}, SOURCE)
    assert not problems and "lacks rms_norm_eps" in line


@pytest.mark.parametrize(
    ("target", "spoils"),
    [
        (HuggingFace(quant="fp8_dynamic"), {"rms_norm_eps": 1e-3, "rope_theta": 5e5}),
        (TensorRTLLM(tp_size=2), {"rotary_base": 5e5, "norm_epsilon": 1e-3, "hidden_act": "gelu", "residual_multiplier": 0.5}),
    ],
)
def test_folders_against_their_source(tmp_path: Path, target: HuggingFace | TensorRTLLM, spoils: Config) -> None:
    source, out = tiny.write(tmp_path / "in"), tmp_path / "out"
    api.convert(source, out, target)
    (out / "streamconv.json").unlink()
    config = json.loads((out / "config.json").read_text())
    assert not verify(out, source).problems
    (out / "config.json").write_text(json.dumps(config | spoils))
    problems = verify(out, source).problems
    assert len(problems) == len(spoils) and all(line.startswith("config.json: ") for line in problems)
    for key, value in spoils.items():
        assert any(f"{key} is {json.dumps(value)}, and" in line for line in problems)
