"""What a `quantization_config` states: which modules hold codes, in which layout; and what of it no engine reads."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.checkpoint.quantized import AUTO_ROUND, AUTO_ROUND_FORMS, gptq_format
from streamconv.checkpoint.unknown_statements import METHODS as OTHERS
from streamconv.checkpoint.unknown_statements import in_known_words, overrides, stored_sparse, unknown_statements
from streamconv.checkpoint.untrusted import read_json, shown_value
from streamconv.errors import CheckpointError, printable
from streamconv.targets.hf.compressed_scheme import compressed_groups
from streamconv.targets.hf.patterns import Patterns
from streamconv.targets.hf.recipes import BLOCK, METHODS, RECIPES
from streamconv.targets.hf.schemes import Scheme, modelopt, tiles, words

IGNORE = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
_UNCHECKED = ("fbgemm_fp8", "mxfp4")
"""Methods that are decoded here, and whose tensors are not checked."""
_OTHER_ALGOS = ("NVFP4_AWQ", "W4A8_AWQ", "W4A8_MXFP4_FP8", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION", "MXFP4", "W4A8_NVFP4_FP8",
                "W4A16_MXFP4")  # fmt: skip
SECOND = "hf_quant_config.json"
"""ModelOpt's, which TensorRT-LLM reads before config.json: both must say the same."""
_LARGEST = 64 << 20
_CACHE = {"num_bits": 8, "type": "float"}


@dataclass(slots=True)
class Group:
    """Modules of one scheme; targets are names, regular expressions, or "Linear" for every linear layer."""

    targets: Sequence[str]
    scheme: Scheme | None
    patterns: Patterns = field(init=False)

    def __post_init__(self) -> None:
        self.patterns = Patterns([target for target in self.targets if target != "Linear"], globs=False)

    def takes(self, module: str) -> bool:
        return "Linear" in self.targets or self.patterns.match(module)


@dataclass(slots=True)
class Statement:
    """A `quantization_config`, read.

    Attributes:
        groups: in the order in which they are asked: names before "Linear".
        ignore: modules that hold no codes.
        listed: there is such a list.
        cache: scales of an FP8 KV cache are stored.
        problems, warnings: what engines would refuse or misread; what is not known here.
    """

    groups: list[Group]
    ignore: Patterns
    listed: bool = True
    cache: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def alike(self) -> bool:
        """All modules are of one scheme, whatever their names are."""
        return all("Linear" in group.targets for group in self.groups)

    def scheme_of(self, module: str) -> Group | None:
        return next((group for group in self.groups if group.takes(module)), None)


def stated_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of integers in words, as far as a config says."""
    for key in ("bits", "w_bit"):
        if type(config.get(key)) is int:
            return int(config[key])
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and type(weights.get("num_bits")) is int:
            return int(weights["num_bits"])
    return None


def read_statement(config: Mapping[str, Any], names: Collection[str] = ()) -> Statement:
    """Read a `quantization_config`; never fails, what is wrong is in `problems`."""
    problems: list[str] = []
    method = config.get("quant_method")
    key = next((key for key in IGNORE if config.get(key)), "")
    listed = config.get(key) if key else []
    if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
        problems.append(f"quantization_config: {key} is no list of names")
        listed = []
    statement = Statement([], Patterns(listed, globs=method != "compressed-tensors"), bool(listed), problems=problems)
    problems += [f"quantization_config: {key} {line}" for line in statement.ignore.wrong]
    statement.warnings += [f"{line}: what it is about is not checked" for line in unknown_statements(config, names)]
    if method == "compressed-tensors":
        _compressed(config, statement, stored_sparse(names))
        return statement
    scheme: Scheme | None = None
    if method in METHODS:
        scheme = _tiles(config, problems)
    elif isinstance(method, str) and method.startswith("modelopt"):
        scheme = _modelopt(config, statement)
    elif method in ("gptq", "awq"):
        scheme = None if overrides(config) else _words(method, config, problems)
    elif method in AUTO_ROUND:
        scheme = _auto_round(config, statement)
    elif method in _UNCHECKED:
        statement.warnings.append(f"config.json states {printable(method)}: its tensors are not checked")
    elif method not in OTHERS:
        problems.append(f"quantization_config: quant_method is {shown_value(method)}, which no engine reads")
    statement.groups.append(Group(("Linear",), scheme))
    return statement


def _compressed(config: Mapping[str, Any], statement: Statement, sparse: bool) -> None:
    groups = compressed_groups(config, statement.problems)
    schemes = [Group(targets, scheme) for targets, scheme in groups]
    statement.groups += sorted(schemes, key=lambda group: "Linear" in group.targets)
    if any(scheme is not None and scheme.ordered for _, scheme in groups):
        statement.warnings.append("config.json states the act order \"group\": compressed-tensors reads it no more since mid-2026")
    for group in schemes:
        statement.problems += [f"quantization_config: targets {line}" for line in group.patterns.wrong]
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        statement.problems.append(f"quantization_config: quantization_status is {shown_value(status)}: readers take no weight for codes")
    sparsity = config.get("sparsity_config")
    if not sparse and sparsity not in (None, {}) and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        form = shown_value(sparsity.get("format") if isinstance(sparsity, dict) else sparsity)
        statement.problems.append(f"quantization_config: sparsity_config states {form}: engines look for sparse weights, these are dense")
    elif not sparse and isinstance(sparsity, dict) and sparsity.get("sparsity_structure") not in (None, "unstructured", "dense"):
        structure = shown_value(sparsity["sparsity_structure"])
        problem = f"quantization_config: sparsity_config states the structure {structure}: engines drop what does not fit it"
        statement.problems.append(problem)
    _cache(config.get("kv_cache_scheme"), statement)


def _cache(scheme: object, statement: Statement) -> None:
    if scheme is None:
        return
    statement.cache = True
    entries = scheme if isinstance(scheme, dict) else {}
    wrong = [key for key, value in _CACHE.items() if entries.get(key) != value]
    wrong += [key for key, value in (("dynamic", False), ("symmetric", True), ("strategy", "tensor")) if entries.get(key, value) != value]
    if wrong:
        shown = shown_value(entries.get(wrong[0])) if entries else shown_value(scheme)
        statement.problems.append(f"quantization_config: kv_cache_scheme: {wrong[0]} is {shown}; engines read static FP8 scales of tensors")


def _tiles(config: Mapping[str, Any], problems: list[str]) -> Scheme | None:
    block, scheme = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        problems.append(f"quantization_config: fmt is {shown_value(config.get('fmt'))}, and engines read e4m3")
    if scheme not in ("dynamic", "static"):
        problems.append(f"quantization_config: activation_scheme is {shown_value(scheme)}, neither dynamic nor static")
    if block is None:
        return tiles(0, 0, scheme == "static")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in block):
        return tiles(block[0], block[1], scheme == "static")
    problems.append(f"quantization_config: weight_block_size is {shown_value(block)}, no pair of sizes")
    return None


def _modelopt(config: Mapping[str, Any], statement: Statement) -> Scheme | None:
    algo = config.get("quant_algo")
    name = str(algo).upper()
    row = next((row for row in RECIPES if row.algo and row.algo.upper() == name), None)
    if row is None:
        line = f"config.json states quant_algo {shown_value(algo)}"
        known = name in _OTHER_ALGOS
        lines = statement.warnings if known else statement.problems
        lines.append(line + (": its tensors are not checked" if known else ", which no engine reads"))
    sizes = list(_group_sizes(config))
    group = sizes[0] if sizes else None
    fixed = (row.unit if row is not None and row.unit > 1 else None) or group
    if other := next((size for size in sizes if size != fixed), None):
        statement.problems.append(f"quantization_config: group_size is {other}, and {name} has groups of {fixed}")
    _cache(config.get("kv_cache_scheme"), statement)
    return modelopt(row, group or BLOCK) if row is not None else None


def _group_sizes(config: Mapping[str, Any]) -> Iterable[int]:
    groups = config.get("config_groups")
    sections = [config, *(groups.values() if isinstance(groups, dict) else ())]
    for part in sections:
        for inner in (part, part.get("weights")) if isinstance(part, dict) else ():
            size = inner.get("group_size") if isinstance(inner, dict) else None
            if type(size) is int and 0 < size < 1 << 20:
                yield size


def _auto_round(config: Mapping[str, Any], statement: Statement) -> Scheme | None:
    """Layouts of GPTQ and AutoAWQ under another name; `extra_config` says what is different in single modules."""
    packing = config.get("packing_format", "auto_round:auto_gptq")
    extra = config.get("extra_config") or {}
    if not in_known_words(config):
        return None
    form = AUTO_ROUND_FORMS[packing]
    method = "awq" if form == "gemm" else "gptq"
    common = {**config, "checkpoint_format": form}
    plain = [name for name, own in extra.items() if own.get("bits", 0) == 16]
    statement.ignore = Patterns(plain, globs=False)
    others = {name: own for name, own in extra.items() if name not in plain}
    statement.groups += [Group((name,), _words(method, {**common, **own}, statement.problems)) for name, own in others.items()]
    return _words(method, common, statement.problems)


def _words(method: str, config: Mapping[str, Any], problems: list[str]) -> Scheme | None:
    bits, group = stated_bits(config), config.get("group_size", config.get("q_group_size"))
    if bits not in (2, 3, 4, 8):
        problems.append(f"quantization_config: bits is {shown_value(config.get('bits', config.get('w_bit')))}, not 2, 3, 4 or 8")
        return None
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 20):
        problems.append(f"quantization_config: group_size is {shown_value(group)}, no size of a group")
        return None
    if bits == 3:
        return None
    form = str(gptq_format(config) or "gptq").lower()
    middle = None
    if method == "gptq" and config.get("sym") is True:
        middle = (1 << (bits - 1)) - (0 if form == "gptq_v2" else 1)
    return words(method, bits, group, bool(config.get("desc_act")), middle)


def group_size(folder: Path) -> dict[str, Any]:
    """The group size that the file states, which ModelOpt's config.json does not repeat; empty if it cannot be read."""
    try:
        inner = read_json(folder / SECOND, _LARGEST).get("quantization")
    except CheckpointError:
        return {}
    return {"group_size": inner["group_size"]} if isinstance(inner, dict) and "group_size" in inner else {}


def second_file(folder: Path, config: Mapping[str, Any], statement: Statement) -> list[str]:
    """What is wrong with the file, or with its absence."""
    modelopt = str(config.get("quant_method", "")).startswith("modelopt")
    there = os.path.lexists(folder / SECOND)
    if modelopt != there:
        return [f"{SECOND} {'is missing' if modelopt else 'is left over: TensorRT-LLM reads it first'}"]
    if not there:
        return []
    try:
        second = read_json(folder / SECOND, _LARGEST)
    except CheckpointError as error:
        return [error.message]
    inner = second.get("quantization", second)
    if not isinstance(inner, dict):
        return [f"{SECOND}: quantization is {shown_value(inner)}, no object"]
    return list(_differences(config, inner, statement))


def _differences(config: Mapping[str, Any], second: Mapping[str, Any], statement: Statement) -> Iterator[str]:
    algo, other = config.get("quant_algo"), second.get("quant_algo")
    if str(algo).upper() != str(other).upper():
        yield f"{SECOND}: quant_algo is {shown_value(other)}, and {shown_value(algo)} in config.json"
    schemes = [group.scheme for group in statement.groups]
    group = next((scheme.group for scheme in schemes if scheme is not None and scheme.container == "modelopt"), None)
    if group is not None and second.get("group_size") != group:
        yield f"{SECOND}: group_size is {shown_value(second.get('group_size'))}, and {group} in config.json"
    if (second.get("kv_cache_quant_algo") is not None) != statement.cache:
        yield f"{SECOND}: kv_cache_quant_algo is {shown_value(second.get('kv_cache_quant_algo'))}, and config.json says otherwise"
    listed = second.get("exclude_modules")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        yield f"{SECOND}: exclude_modules is {shown_value(listed)}, no list of names"
    elif set(listed) != statement.ignore.listed:
        odd = sorted(set(listed) ^ statement.ignore.listed)
        yield f"{SECOND}: exclude_modules and config.json's ignore list differ in {shown_value(odd[0])}"
