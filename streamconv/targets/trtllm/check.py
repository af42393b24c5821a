"""What TensorRT-LLM's loader asks of a checkpoint folder: config.json, the set of rank files, tensors that ranks must hold alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.checkpoint.shard import Shard
from streamconv.errors import VerifyError, printable
from streamconv.natural import natural
from streamconv.targets.checks import SHOWN, Contents, Findings, flat, line, rope_scaling
from streamconv.targets.trtllm import expected, rank_peers
from streamconv.targets.trtllm.expected_forms import MOST_RANKS
from streamconv.targets.trtllm.options import TensorRTLLM

LOADABLE = {"F16", "BF16", "F32", "I8", "I32", "I64", "BOOL", "F8_E4M3"}
_REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mapping")
_ENGINE_ONLY = re.compile(
    r"mapping|quantization\.(?!clamp_val|has_zero_point|pre_quant_scale).*|runtime_defaults|logits_dtype|dtype|num_labels|seq_length"
    r"|max_position_embeddings|tie_word_embeddings|share_embedding_table|use_parallel_embedding|embedding_sharding_dim|moe\.tp_mode"
    r"|disable_weight_only_quant_plugin|has_partial_lora_mask|quant_ckpt_path|load_model_on_cpu|device|qwen_type"
)
"""Keys of a TensorRT-LLM checkpoint that say how it is run or was made, or that follow from the options."""


def tensor_files(folder: Path, config: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The rank files that config.json speaks of and that are there, in order.

    Raises:
        VerifyError: config.json describes no ranks.
    """
    problems += [f"config.json: {key} is missing" for key in _REQUIRED if config.get(key) is None]
    for key in ("quant_mode", "quant_algo", "kv_dtype"):
        if key in config:
            problems.append(f"config.json: top-level {key} makes the loader fail")
    world = _world(config, problems)
    present = {path.name for path in folder.iterdir() if re.fullmatch(r"rank\d+\.safetensors", path.name)}
    named = {f"rank{number}.safetensors" for number in range(world)}
    problems += [f"{name} is missing" for name in sorted(named - present)]
    problems += [f"{name} belongs to no rank of config.json" for name in sorted(present - named)]
    return sorted(named & present, key=lambda text: int(text[4:-12]))


def check(contents: Contents) -> Findings:
    """Problems and warnings."""
    problems, warnings = expected.check(dict(contents.config), {name: dict(tensors) for name, tensors in contents.shapes.items()})
    return problems + _peers(contents), warnings


def made_with(config: Mapping[str, Any], first: Path) -> Sequence[TensorRTLLM]:
    """Options that may have given this checkpoint, see `stated`."""
    from streamconv.targets.trtllm.stated import options_of

    return options_of(config, Shard(first).header().tensors)


def config_differences(config: Mapping[str, Any], given: Mapping[str, Any]) -> Findings:
    """Problems and warnings of a TensorRT-LLM checkpoint: what the engine computes with is a problem.

    Args:
        given: what a conversion of the source writes.
    """
    stored, converted = (dict(flat({**of, "rotary_scaling": rope_scaling(of.get("rotary_scaling"))}, "")) for of in (config, given))
    problems, warnings = list[str](), list[str]()
    for key, value in converted.items():
        if key in stored and stored[key] != value:
            where = warnings if _ENGINE_ONLY.fullmatch(key) or key.startswith("mapping.") else problems
            where.append(line(key, stored[key], value, "as this source gives it"))
    return problems[:SHOWN], warnings


def engine_reads(folder: Path) -> tuple[str, list[str]]:
    """What TensorRT-LLM's own reader says, see `official_reader`: a line for people, and a line for each rank that it refused."""
    from streamconv.targets.trtllm.official_reader import read_ranks

    version, accepted, refused = read_ranks(folder)
    return f"TensorRT-LLM {version} accepted {accepted} ranks, refused {len(refused)}", refused


def _world(config: Mapping[str, Any], problems: list[str]) -> int:
    mapping = config.get("mapping")
    if not isinstance(mapping, dict):
        raise VerifyError("config.json: mapping is not an object")
    try:
        tp, pp, cp = (int(mapping.get(key, 1)) for key in ("tp_size", "pp_size", "cp_size"))
        if tp * pp * cp != int(mapping.get("world_size", 1)):
            problems.append("config.json: mapping.world_size is not tp_size * pp_size * cp_size")
        if int(mapping.get("moe_tp_size", tp)) * int(mapping.get("moe_ep_size", 1)) not in (tp, 1, -1, -tp):
            problems.append("config.json: moe_tp_size * moe_ep_size is not tp_size")
    except (TypeError, ValueError, OverflowError) as error:
        raise VerifyError(f"config.json: mapping: {error}") from error
    if tp < 1 or pp < 1 or tp * pp > MOST_RANKS:
        raise VerifyError(f"config.json: mapping: tp_size {tp} and pp_size {pp} cannot be")
    return tp * pp


def _peers(contents: Contents) -> list[str]:
    """Rank files that are not those of one conversion."""
    problems, tp = list[str](), int(contents.config["mapping"].get("tp_size", 1))
    for name in contents.shapes:
        first = f"rank{int(name[4:-12]) // tp * tp}.safetensors"
        if first in contents.shapes and (odd := set(contents.shapes[first]) ^ set(contents.shapes[name])):
            problems.append(f"{first} and {name} hold different tensors, for example {printable(min(odd, key=natural))}")
    names = {name: tuple(tensors) for name, tensors in contents.shapes.items()}
    hash_of = lambda file, tensor: contents.hashes.get((file, tensor), "")  # noqa: E731
    return problems + list(rank_peers.problems(contents.config, names, hash_of, contents.copies))
