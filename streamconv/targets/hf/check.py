"""What can be said of a quantized Hugging Face directory without its source: ours or another tool's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from streamconv.checkpoint.dtypes import DTYPES
from streamconv.checkpoint.limits import MAX_WEIGHT_MAP
from streamconv.checkpoint.quantized import AUTO_ROUND, stated_in
from streamconv.checkpoint.unknown_statements import overrides
from streamconv.checkpoint.untrusted import parse_json, read_file, shown_value
from streamconv.errors import UsageError, VerifyError, printable
from streamconv.natural import natural
from streamconv.targets.base import Target
from streamconv.targets.checks import SHOWN, Contents, Findings, flat, line, rope_scaling
from streamconv.targets.hf.check_scales import SCALES, SHARED, check_tensors, check_values, codes_of, unordered
from streamconv.targets.hf.layers import Model, differences, in_order
from streamconv.targets.hf.model_types import text_config
from streamconv.targets.hf.rules import NOT_LINEAR, default_reason, is_other_part, partners
from streamconv.targets.hf.stated import Statement, group_size, read_statement, second_file, stated_bits
from streamconv.targets.hf.units import Tensors, kinds

LOADABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I16", "I32", "I64", "BOOL"}
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_WORDS = ("gptq", "awq", *AUTO_ROUND)
"""Methods whose readers leave what has no codes as it is."""
_SHOWN = 20
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_BOOKKEEPING = re.compile(
    r"_.*|.*dtype|.*(dropout|_pdrop|_token_id|_loss_coef|_loss|_implementation)|transformers_version|auto_map|use_cache"
    r"|(quantization|compression)_config"
    r"|initializer_range|output_(attentions|hidden_states|router_logits)|return_dict.*|torchscript|id2label|label2id|problem_type"
    r"|pretraining_tp|tokenizer_class|task_specific_params|gradient_checkpointing|router_jitter_noise|name_or_path|layer_types"
)
"""Keys that no logit depends on, or that releases of transformers derive from others; types of weights are compared by themselves."""
_FILLED = ("head_dim", "num_key_value_heads", "hidden_activation")
"""What transformers computes where the source says null."""


def tensor_files(folder: Path, config: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The safetensors files of a directory, held against its index."""
    present = sorted(path.name for path in folder.iterdir() if path.name.endswith(".safetensors"))
    listed, _ = _index(folder, problems)
    if listed is None:
        if len(present) != 1 and present:
            problems.append(f"{len(present)} safetensors files and no {INDEX}")
        return present
    problems += [f"{printable(name)}, named in {INDEX}, is missing" for name in sorted(set(listed.values()) - set(present))]
    problems += [f"{printable(name)} is not named in {INDEX}: no loader reads it" for name in sorted(set(present) - set(listed.values()))]
    return [name for name in present if name in set(listed.values())]


def _index(folder: Path, problems: list[str]) -> tuple[dict[str, str] | None, object]:
    """(tensor -> file, sum of their bytes), as the index states them."""
    path = folder / INDEX
    if not os.path.exists(path):
        return None, None
    content = parse_json(read_file(path, MAX_WEIGHT_MAP, VerifyError), printable(path), VerifyError)
    listed, metadata = (content.get(key) if isinstance(content, dict) else None for key in ("weight_map", "metadata"))
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        problems.append(f"{INDEX} has no weight_map")
        return None, None
    return listed, metadata.get("total_size") if isinstance(metadata, dict) else None


def check(contents: Contents) -> Findings:
    """Problems and warnings: the index, the config against the tensors, partners, what is left out of `ignore`."""
    problems: list[str] = []
    warnings: list[str] = []
    folder, config, shapes = contents.folder, contents.config, contents.shapes
    tensors = {name: entries for file in shapes.values() for name, entries in file.items()}
    if sum(map(len, shapes.values())) != len(tensors):
        problems.append("a tensor is in two files")
    listed, stated_size = _index(folder, [])
    if listed is not None:
        places = {name: file for file, names in shapes.items() for name in names}
        odd = sorted((name for name in {*listed, *places} if listed.get(name) != places.get(name)), key=natural)
        problems += [f"{INDEX}: {printable(name)} is not where it says" for name in odd[:20]]
        total = sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in tensors.values() if dtype in DTYPES)
        problems += [] if stated_size == total else [f"{INDEX}: total_size is {stated_size}, the tensors have {total} bytes"]
    quantization = stated_in(config)
    facts: Mapping[str, Any] = quantization if isinstance(quantization, dict) else {}
    bits = stated_bits(facts) or (4 if facts.get("quant_method") in _WORDS else None)
    model = Model(config, kinds(tensors), None if overrides(facts) else bits)
    wrong, odd = differences(model)
    problems += in_order(wrong)[:_SHOWN]
    warnings += odd
    codes = codes_of(tensors)
    if not isinstance(quantization, dict):
        bare = sorted(codes, key=natural)[:5]
        problems += [f"{printable(name)} is quantized, and config.json has no quantization_config" for name in bare]
        problems += [f"config.json: quantization_config is {shown_value(quantization)}, no object"] if quantization is not None else []
        return problems, warnings
    if not codes and not any(name.endswith("_blocks") for name in tensors):
        problems.append("config.json has a quantization_config, and no weight is quantized")
    statement = read_statement(group_size(folder) | quantization, tensors)
    problems += statement.problems[:_SHOWN]
    warnings += dict.fromkeys(statement.warnings)
    wrong, odd = check_tensors(codes, tensors, statement)
    problems += wrong[:_SHOWN]
    warnings += odd
    problems += check_values(folder, shapes, tensors, statement)[:_SHOWN]
    wrong, odd = check_names(folder, quantization, codes, tensors, statement, model)
    return problems + wrong, warnings + odd


def made_with(config: Mapping[str, Any], first: Path) -> Sequence[Target]:
    """None: how another tool rounds is not known, so values are compared."""
    return ()


def engine_reads(folder: Path) -> tuple[str, list[str]]:
    """No engine's own reader is asked."""
    raise UsageError("--with-tensorrt-llm is for rank files, and this is a Hugging Face directory", hint="leave it out")


def check_names(
    folder: Path, quantization: Mapping[str, Any], codes: set[str], tensors: Tensors, statement: Statement, model: Model
) -> tuple[list[str], list[str]]:
    """Problems and warnings that names alone tell: what --quant keep would keep, and engines refuse or misread.

    Args:
        quantization: the `quantization_config`; `statement` is what was read of it.
        codes: modules whose weights are codes.
    """
    problems = [*unordered(codes, tensors, statement)][:_SHOWN]
    problems += _scales(codes, tensors, any(group.scheme is None for group in statement.groups))
    method = quantization.get("quant_method")
    problems += _ignored(codes, tensors, statement, method != "mxfp4" and (statement.listed or method not in _WORDS))
    problems += _partners(codes, tensors)
    kept, loose = _cache(model, tensors, statement)
    return problems + kept + second_file(folder, quantization, statement), loose


def _cache(model: Model, tensors: Tensors, statement: Statement) -> tuple[list[str], list[str]]:
    """Scales of the FP8 KV cache: one each for keys and values of every attention, or none."""
    attentions = {name.rpartition(".k_proj.")[0] for name in tensors if ".k_proj." in name and not is_other_part(name)}
    lines, count = [], 0
    for at in sorted(attentions, key=natural):
        for which in "kv":
            there = f"{at}.{which}_scale" in tensors or f"{at}.{which}_proj.{which}_scale" in tensors
            count += there
            if not there:
                lines.append(f"{printable(at)} has no {which}_scale, and config.json states an FP8 KV cache: engines take 1 for it")
    if statement.cache:
        return ([], lines[:1]) if model.fragment else (lines[:_SHOWN], [])
    return [], ["scales of a KV cache are there, and config.json has no kv_cache_scheme: engines may not read them"] if count else []


def _scales(codes: set[str], tensors: Tensors, unknown: bool) -> list[str]:
    lines = []
    for module in sorted(codes, key=natural):
        if unknown and not any(f"{module}.{leaf}" in tensors for leaf in SCALES):
            lines.append(f"{printable(module)} has codes and no scales")
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in SCALES + SHARED and module not in codes:
            lines.append(f"{printable(name)} belongs to no quantized weight")
    return lines[:20]


def _ignored(codes: set[str], tensors: Tensors, statement: Statement, complete: bool) -> list[str]:
    """Modules that the ignore list should name, or should not.

    Args:
        complete: readers take what is not ignored for codes; of MXFP4 none does, which is for experts alone.
    """
    lines = []
    for module in sorted(codes, key=natural):
        if statement.ignore.match(module):
            lines.append(f"{printable(module)} is quantized, and the config's ignore list covers it")
    for name, (dtype, shape) in tensors.items() if complete else ():
        module = name.removesuffix(".weight")
        linear = name.endswith(".weight") and len(shape) == 2 and dtype in _FLOATS and module not in codes
        if not linear or default_reason(module) in NOT_LINEAR or statement.ignore.match(module):
            continue
        if statement.scheme_of(module) is not None:
            lines.append(f"{printable(module)} is not quantized, and the config's ignore list does not name it: loaders take it for codes")
    if complete and "lm_head" not in codes and statement.scheme_of("lm_head") is not None and not statement.ignore.match("lm_head"):
        lines.append("the config's ignore list does not name lm_head, which is not quantized")
    return list(dict.fromkeys(lines))[:_SHOWN]


def _partners(codes: set[str], tensors: Tensors) -> list[str]:
    lines = []
    for module in sorted(codes, key=natural):
        for other in partners(module):
            if other not in codes and f"{other}.weight" in tensors:
                lines.append(f"{printable(module)} is quantized and {printable(other)} is not: engines join them to one matrix")
    return lines[:20]


def config_differences(config: Mapping[str, Any], source: Mapping[str, Any]) -> Findings:
    """Problems and warnings of a Hugging Face directory: other values than the source's, and keys that the source alone has.

    Args:
        source: that of a Hugging Face source.
    """
    own, theirs = text_config(config), text_config(source)
    own_facts, source_facts = _facts(own), _facts(theirs)
    if (own is config) == (theirs is source):
        own_facts |= {key: value for key, value in _facts(config).items() if not key.startswith("rope.")} if own is not config else {}
        source_facts |= {key: value for key, value in _facts(source).items() if not key.startswith("rope.")} if theirs is not source else {}
    else:  # the language model alone, or put back into a wrapper
        for facts in (own_facts, source_facts):
            facts.pop("architectures", None)
            facts.pop("model_type", None)
    if theirs.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers"):
            source_facts.pop(key, None)
    source_facts = {key: value for key, value in source_facts.items() if value is not None or key not in _FILLED}
    lost = [key for key, value in source_facts.items() if key not in own_facts and value is not None]
    both = [(key, own_facts[key], value) for key, value in source_facts.items() if key in own_facts]
    problems = [line(key, own, value, "in the source") for key, own, value in both if own != value]
    lacking = f"config.json lacks {', '.join(map(printable, lost[:5]))}{' and others' if len(lost) > 5 else ''}, which the source's has"
    return problems[:SHOWN], [lacking] if lost else []


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config that count, those of inner objects with a dot; both spellings of rotary embedding are one."""
    inner = {key: value for key, value in config.items() if key not in _ROPE and value is not text_config(config)}
    facts = {key: value for key, value in flat(inner, "") if not any(_BOOKKEEPING.fullmatch(part) for part in key.split("."))}
    return facts | dict(flat(_rope(config), "rope."))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    new, old = (value if isinstance(value := config.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling"))
    if any(isinstance(value, dict) for value in new.values()):
        return {key: rope_scaling(value) if isinstance(value, dict) else value for key, value in new.items()}
    scaling = rope_scaling(old if rope_scaling(old)["type"] != "default" else new)
    rope: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
        values = [of[key] for of in (new, old, config) if of.get(key) is not None]
        rope |= {key: values[0]} if values else {}
    return rope | scaling
