"""What is quantized of real architectures, and what is left as it is and why: decided by names and shapes alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from streamconv import api
from streamconv.errors import RefusedError
from streamconv.targets.hf.rules import PARTNERS, classify, matches, partners, split_groups
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny

EMBEDDING, HEAD, ROUTER = "embedding", "output projection", "router"
OTHER, NOT_LINEAR = "not part of the language model", "not a linear layer"
_ATTENTION = {f"self_attn.{leaf}_proj": "" for leaf in "qkvo"}
_MLP = {f"mlp.{leaf}_proj": "" for leaf in ("gate", "up", "down")}


def _in(prefix: str, modules: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}{name}": reason for name, reason in modules.items()}


_MLA = _in("self_attn.", dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), ""))
_DENSE = {"model.embed_tokens": EMBEDDING, "lm_head": HEAD} | _in("model.layers.0.", _ATTENTION | _MLP)
_EXPERTS = _in("mlp.experts.7.", {"gate_proj": "", "up_proj": "", "down_proj": ""})

ARCHITECTURES: dict[str, dict[str, str]] = {
    "Llama, Mistral, Qwen2, Qwen3, Gemma": _DENSE,
    "Phi-3": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.3.", {"self_attn.qkv_proj": "", "self_attn.o_proj": "", "mlp.gate_up_proj": "", "mlp.down_proj": ""}),
    "Mixtral": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.1.", _ATTENTION | {"block_sparse_moe.gate": ROUTER})
    | _in("model.layers.1.block_sparse_moe.experts.0.", {"w1": "", "w2": "", "w3": ""}),
    "Qwen2-MoE, Qwen3-MoE": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.1.", _ATTENTION | _EXPERTS | {"mlp.gate": ROUTER, "mlp.shared_expert_gate": ROUTER})
    | _in("model.layers.1.mlp.shared_expert.", {"gate_proj": "", "up_proj": "", "down_proj": ""}),
    "Qwen3-Next": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.0.linear_attn.", {"in_proj_qkvz": "", "in_proj_ba": "", "out_proj": ""})
    | _in("model.layers.3.", _ATTENTION | _EXPERTS | {"mlp.gate": ROUTER, "mlp.shared_expert_gate": ROUTER}),
    "DeepSeek-V3, Kimi-K2": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.5.", _MLA | _EXPERTS | {"mlp.gate": ROUTER})
    | _in("model.layers.5.mlp.shared_experts.", {"gate_proj": "", "up_proj": "", "down_proj": ""})
    | {"model.layers.61.embed_tokens": EMBEDDING, "model.layers.61.shared_head.head": HEAD, "model.layers.61.eh_proj": ""},
    "LLaVA, Mistral-3": _in("language_model.", _DENSE)
    | {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": OTHER,
        "vision_tower.transformer.layers.0.feed_forward.gate_proj": OTHER,
        "multi_modal_projector.linear_1": OTHER,
        "multi_modal_projector.patch_merger.merging_layer": OTHER,
    },
    "Qwen2-VL, Qwen2.5-VL": _DENSE
    | {"visual.blocks.0.attn.qkv": OTHER, "visual.blocks.0.mlp.gate_proj": OTHER, "visual.merger.mlp.0": OTHER},
    "Qwen3-VL": {name.replace("model.", "model.language_model.", 1): reason for name, reason in _DENSE.items()}
    | {"model.visual.blocks.0.attn.proj": OTHER, "model.visual.deepstack_merger_list.0.linear_fc1": OTHER, "model.visual.pos_embed": OTHER},
    "Llama 4": {"language_model.model.embed_tokens": EMBEDDING, "language_model.lm_head": HEAD}
    | _in("language_model.model.layers.1.", _ATTENTION | {"feed_forward.router": ROUTER})
    | _in("language_model.model.layers.1.feed_forward.shared_expert.", {"gate_proj": "", "up_proj": "", "down_proj": ""})
    | {"vision_model.model.layers.0.mlp.fc1": OTHER, "multi_modal_projector.linear_1": OTHER},
    "gpt-oss": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD} | _in("model.layers.0.", _ATTENTION | {"mlp.router": ROUTER}),
    "InternVL": _in("language_model.", _DENSE) | {"vision_model.encoder.layers.0.attn.qkv": OTHER, "mlp1.1": OTHER},
    "InternLM2": {"model.tok_embeddings": EMBEDDING, "output": HEAD}
    | _in("model.layers.0.attention.", {"wqkv": "", "wo": ""})
    | _in("model.layers.0.feed_forward.", {"w1": "", "w2": "", "w3": ""}),
    "Whisper, Qwen2-Audio": {"audio_tower.layers.0.fc1": OTHER, "audio_tower.layers.0.self_attn.q_proj": OTHER}
    | _in("language_model.", _DENSE),
    "Gemma-3n": _in("model.language_model.", {"embed_tokens": EMBEDDING, "embed_tokens_per_layer": EMBEDDING})
    | _in("model.language_model.layers.0.", _ATTENTION | _MLP | {"per_layer_input_gate": "", "per_layer_projection": ""})
    | {"model.vision_tower.timm_model.blocks.0.0.conv_exp": OTHER, "model.embed_vision.embedding_projection": OTHER},
    "projections of embeddings": {"model.embedder.proj": "part of an embedding", "model.altup.modality_router": ROUTER},
    "Granite-MoE hybrid, Mamba": {"model.embed_tokens": EMBEDDING}
    | _in("model.layers.0.", {"mamba.in_proj": "", "mamba.out_proj": "", "block_sparse_moe.router.layer": ROUTER}),
    "GPT-2, OPT": {"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING, "model.decoder.embed_positions": EMBEDDING},
    "MiniMax": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}
    | _in("model.layers.0.self_attn.", {"qkv_proj": "", "output_gate": "", "out_proj": ""})
    | {"model.layers.0.block_sparse_moe.gate": ROUTER},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_names(name: str) -> None:
    wanted = ARCHITECTURES[name]
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": (256, 256) for module in wanted}
    shapes |= {"model.norm.weight": (256,), "model.layers.0.linear_attn.conv1d.weight": (256, 1, 4), "model.layers.0.q_proj.bias": (256,)}
    assert {module.name: module.reason for module in classify(shapes, (), ())} == wanted
    assert split_groups(classify(shapes, (), ())) == []


def test_only_and_ignore() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": (256, 256) for module in _DENSE}
    only = {m.name for m in classify(shapes, (), ("lm_head", "re:.*mlp")) if not m.reason}
    assert only == {"lm_head", *(name for name in _DENSE if ".mlp." in name)}
    left = {m.name: m.reason for m in classify(shapes, ("*.o_proj",), ())}
    assert left["model.layers.0.self_attn.o_proj"] == "named by --ignore" and left["model.layers.0.mlp.up_proj"] == ""
    assert matches("a.b", ["re:a"]) and not matches("b.a", ["re:a"]) and matches("a.b", ["*.b"]) and not matches("a.b", ["b"])


@pytest.mark.parametrize("quant", ["fp8_dynamic", "w4a16", "nvfp4a16", "fp8_block"])
def test_only_takes_no_embedding(tmp_path: Path, quant: str) -> None:
    """Readers quantize nn.Linear alone: codes of an embedding would be taken for floats."""
    source = tiny.write(tmp_path / "source")
    for named in ("model.embed_tokens", "*embed*"):
        with pytest.raises(RefusedError, match="matches no linear layer"):
            api.open_and_plan(source, HuggingFace(quant=quant, only=(named, "*.down_proj")))
    api.convert(source, tmp_path / "out", HuggingFace(quant=quant, only=("*",)))
    weights = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    assert verify(tmp_path / "out", source).problems == []


def test_only_takes_no_head_that_is_the_embedding(tmp_path: Path) -> None:
    """Readers put the embedding in its place, and take its floats for codes where config.json does not list lm_head."""
    source = tiny.write(tmp_path / "source", settings=tiny.config(tie_word_embeddings=True))
    with pytest.raises(RefusedError, match="--only lm_head matches no linear layer"):
        api.open_and_plan(source, HuggingFace(quant="fp8_dynamic", only=("lm_head", "*.down_proj")))
    api.convert(source, tmp_path / "out", HuggingFace(quant="fp8_dynamic", only=("*",)))
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert stated["ignore"] == ["lm_head"] and load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.float16
    api.open_and_plan(tiny.write(tmp_path / "untied"), HuggingFace(quant="fp8_dynamic", only=("lm_head",)))[0].close()


@pytest.mark.parametrize("group", PARTNERS)
def test_partners_go_together(group: tuple[str, ...]) -> None:
    names = [f"model.layers.0.x.{leaf}" for leaf in group]
    assert all(partners(name) == tuple(names) for name in names)
    modules = classify({f"{name}.weight": (256, 256) for name in names}, (), ())
    (line,) = split_groups([replace(modules[0], reason="named by --ignore"), *modules[1:]])
    assert names[0] in line


def weights(shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
    random = np.random.default_rng(1)
    return {f"{name}.weight": random.normal(0, 0.05, shape).astype(np.float16) for name, shape in shapes.items()}


_AT = "model.layers.0."
_TILES = {
    _AT + "self_attn.q_a_proj": (256, 256), _AT + "self_attn.kv_a_proj_with_mqa": (320, 256), _AT + "self_attn.q_b_proj": (256, 256),
    _AT + "self_attn.kv_b_proj": (256, 256), _AT + "self_attn.o_proj": (256, 256), _AT + "mlp.gate_proj": (384, 256),
    "model.layers.61.eh_proj": (256, 512), _AT + "mlp.up_proj": (384, 256), _AT + "mlp.down_proj": (256, 384),
    _AT + "mlp.odd_proj": (256, 448),
}  # fmt: skip


_MLA_LEFT = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}
"""320 rows are no multiple of 128, and engines join both to one matrix."""


@pytest.mark.parametrize(
    ("options", "left"),
    [
        # transformers takes the tile's size from the grid; kv_b_proj is left by TensorRT-LLM and taken apart by all
        (HuggingFace(quant="fp8_block"), {*_MLA_LEFT, "self_attn.kv_b_proj", "mlp.odd_proj", "model.layers.61.eh_proj"}),
        # activations come in groups of 128: K decides
        (HuggingFace(quant="fp8_block", format="compressed-tensors"), {"mlp.odd_proj"}),
        (HuggingFace(quant="fp8_dynamic"), set()),
        (HuggingFace(quant="fp8_block", only=("*kv_b_proj",)), {name.removeprefix(_AT) for name in _TILES} - {"self_attn.kv_b_proj"}),
    ],
)  # fmt: skip
def test_sizes_of_tiles(tmp_path: Path, options: HuggingFace, left: set[str]) -> None:
    source = tiny.write(tmp_path / "source", weights(_TILES), tiny.config(num_hidden_layers=0))
    index, plan = api.open_and_plan(source, options)
    index.close()
    done = {name for file in plan.files for name in file.names()}
    scaled = {name.rpartition(".")[0].removeprefix(_AT) for name in done if "scale" in name}
    assert {name.removeprefix(_AT) for name in _TILES} - scaled == left


def test_groups_that_do_not_divide_are_refused_with_a_way_out(tmp_path: Path) -> None:
    held = weights({_AT + "mlp.odd_proj": (256, 192), _AT + "mlp.down_proj": (256, 256)})
    source = tiny.write(tmp_path / "source", held, tiny.config(num_hidden_layers=1))
    with pytest.raises(RefusedError, match=r"\[256, 192\] does not divide into groups of 128: use --group-size 64, or leave it"):
        api.open_and_plan(source, HuggingFace(quant="w4a16"))
    for options in (HuggingFace(quant="w4a16", group_size=64), HuggingFace(quant="w4a16", ignore=(r"re:.*\.odd_proj$",))):
        api.open_and_plan(source, options)[0].close()
    other = tiny.write(tmp_path / "other", weights({_AT + "mlp.odd_proj": (256, 200)}), tiny.config(num_hidden_layers=1))
    for quant in ("w4a16", "nvfp4a16"):  # no size divides; there is one size only
        with pytest.raises(RefusedError, match=r"does not divide into groups of \d+: leave it"):
            api.open_and_plan(other, HuggingFace(quant=quant))
