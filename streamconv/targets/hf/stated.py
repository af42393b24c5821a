"""What a `quantization_config` states: which modules hold codes, in which layout; and what of it no engine reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamconv.checkpoint.quantized import AUTO_ROUND, AUTO_ROUND_FORMS, gptq_format
from streamconv.checkpoint.unknown_statements import METHODS as OTHERS
from streamconv.checkpoint.unknown_statements import in_known_words, overrides, stored_sparse, unknown_statements
from streamconv.checkpoint.untrusted import shown_value
from streamconv.errors import printable
from streamconv.targets.hf.compressed_scheme import compressed_groups
from streamconv.targets.hf.other_schemes import Modelopt, Tiles, Words
from streamconv.targets.hf.patterns import Patterns
from streamconv.targets.hf.recipes import BLOCK, METHODS, RECIPES
from streamconv.targets.hf.weights import Tensors, Told

IGNORE = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
_UNCHECKED = ("fbgemm_fp8", "mxfp4")
"""Methods that are decoded here, and whose tensors are not checked."""
_OTHER_ALGOS = ("NVFP4_AWQ", "W4A8_AWQ", "W4A8_MXFP4_FP8", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION", "MXFP4", "W4A8_NVFP4_FP8",
                "W4A16_MXFP4")  # fmt: skip
_CACHE = {"num_bits": 8, "type": "float"}


class Scheme(Protocol):
    """How the weights of some modules are stored."""

    @property
    def title(self) -> str: ...
    @property
    def main(self) -> str:
        """Last name of the codes."""

    @property
    def tiled(self) -> str:
        """Which sizes should be multiples of 128: "cols", "rows, cols", or none."""

    def wanted(self, module: str, tensors: Tensors) -> dict[str, list[Told]] | None:
        """Last name -> the dtypes and shapes that the tensor may have; None if the codes are of another format."""


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


def stated_bits(stated: Mapping[str, Any]) -> int | None:
    """Bits of integers in words, as far as a config says."""
    for key in ("bits", "w_bit"):
        if type(stated.get(key)) is int:
            return int(stated[key])
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        held = group.get("weights") if isinstance(group, dict) else None
        if isinstance(held, dict) and type(held.get("num_bits")) is int:
            return int(held["num_bits"])
    return None


def read_statement(stated: Mapping[str, Any], names: Collection[str] = ()) -> Statement:
    """Read a `quantization_config`; never fails, what is wrong is in `problems`."""
    problems: list[str] = []
    method = stated.get("quant_method")
    key = next((key for key in IGNORE if stated.get(key)), "")
    listed = stated.get(key) if key else []
    if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
        problems.append(f"quantization_config: {key} is no list of names")
        listed = []
    made = Statement([], Patterns(listed, globs=method != "compressed-tensors"), bool(listed), problems=problems)
    problems += [f"quantization_config: {key} {line}" for line in made.ignore.wrong]
    made.warnings += [f"{line}: what it is about is not checked" for line in unknown_statements(stated, names)]
    if method == "compressed-tensors":
        _compressed(stated, made, stored_sparse(names))
    elif method in METHODS:
        made.groups.append(Group(("Linear",), _tiles(stated, problems)))
    elif isinstance(method, str) and method.startswith("modelopt"):
        _modelopt(stated, made)
    elif method in ("gptq", "awq"):
        made.groups.append(Group(("Linear",), None if overrides(stated) else _words(method, stated, problems)))
    elif method in AUTO_ROUND:
        _auto_round(stated, made)
    elif method in _UNCHECKED:
        made.warnings.append(f"config.json states {printable(str(method))}: its tensors are not checked")
        made.groups.append(Group(("Linear",), None))
    elif method in OTHERS:
        made.groups.append(Group(("Linear",), None))
    else:
        problems.append(f"quantization_config: quant_method is {shown_value(method)}, which no engine reads")
        made.groups.append(Group(("Linear",), None))
    return made


def _compressed(stated: Mapping[str, Any], made: Statement, sparse: bool) -> None:
    groups = compressed_groups(stated, made.problems)
    held = [Group(targets, scheme) for targets, scheme in groups]
    made.groups += sorted(held, key=lambda group: "Linear" in group.targets)
    if any(scheme is not None and scheme.weights.ordered for _, scheme in groups):
        made.warnings.append("config.json states the act order \"group\": compressed-tensors reads it no more since mid-2026")
    for group in held:
        made.problems += [f"quantization_config: targets {line}" for line in group.patterns.wrong]
    status = stated.get("quantization_status", "compressed")
    if status != "compressed":
        made.problems.append(f"quantization_config: quantization_status is {shown_value(status)}: readers take no weight for codes")
    sparsity = stated.get("sparsity_config")
    if not sparse and sparsity not in (None, {}) and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        form = shown_value(sparsity.get("format") if isinstance(sparsity, dict) else sparsity)
        made.problems.append(f"quantization_config: sparsity_config states {form}: engines look for sparse weights, these are dense")
    elif not sparse and isinstance(sparsity, dict) and sparsity.get("sparsity_structure") not in (None, "unstructured", "dense"):
        told = shown_value(sparsity["sparsity_structure"])
        made.problems.append(f"quantization_config: sparsity_config states the structure {told}: engines drop what does not fit it")
    _cache(stated.get("kv_cache_scheme"), made)


def _cache(scheme: object, made: Statement) -> None:
    if scheme is None:
        return
    made.cache = True
    held = scheme if isinstance(scheme, dict) else {}
    wrong = [key for key, value in _CACHE.items() if held.get(key) != value]
    wrong += [key for key, value in (("dynamic", False), ("symmetric", True), ("strategy", "tensor")) if held.get(key, value) != value]
    if wrong:
        told = shown_value(held.get(wrong[0])) if held else shown_value(scheme)
        made.problems.append(f"quantization_config: kv_cache_scheme: {wrong[0]} is {told}; engines read static FP8 scales of tensors")


def _tiles(stated: Mapping[str, Any], problems: list[str]) -> Tiles | None:
    block, scheme = stated.get("weight_block_size"), stated.get("activation_scheme", "dynamic")
    if stated.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        problems.append(f"quantization_config: fmt is {shown_value(stated.get('fmt'))}, and engines read e4m3")
    if scheme not in ("dynamic", "static"):
        problems.append(f"quantization_config: activation_scheme is {shown_value(scheme)}, neither dynamic nor static")
    if block is None:
        return Tiles(0, 0, scheme == "static")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in block):
        return Tiles(block[0], block[1], scheme == "static")
    problems.append(f"quantization_config: weight_block_size is {shown_value(block)}, no pair of sizes")
    return None


def _modelopt(stated: Mapping[str, Any], made: Statement) -> None:
    algo = stated.get("quant_algo")
    name = str(algo).upper()
    row = next((row for row in RECIPES if row.algo and row.algo.upper() == name), None)
    if row is None:
        line = f"config.json states quant_algo {shown_value(algo)}"
        known = name in _OTHER_ALGOS
        (made.warnings if known else made.problems).append(line + (": its tensors are not checked" if known else ", which no engine reads"))
    sizes = list(_group_sizes(stated))
    group = sizes[0] if sizes else None
    fixed = (row.unit if row is not None and row.unit > 1 else None) or group
    if other := next((size for size in sizes if size != fixed), None):
        made.problems.append(f"quantization_config: group_size is {other}, and {name} has groups of {fixed}")
    made.groups.append(Group(("Linear",), Modelopt(row, group or BLOCK) if row is not None else None))
    _cache(stated.get("kv_cache_scheme"), made)


def _group_sizes(stated: Mapping[str, Any]) -> Iterable[int]:
    groups = stated.get("config_groups")
    held = [stated, *(groups.values() if isinstance(groups, dict) else ())]
    for part in held:
        for inner in (part, part.get("weights")) if isinstance(part, dict) else ():
            size = inner.get("group_size") if isinstance(inner, dict) else None
            if type(size) is int and 0 < size < 1 << 20:
                yield size


def _auto_round(stated: Mapping[str, Any], made: Statement) -> None:
    """Layouts of GPTQ and AutoAWQ under another name; `extra_config` says what is different in single modules."""
    packing = stated.get("packing_format", "auto_round:auto_gptq")
    extra = stated.get("extra_config") or {}
    if not in_known_words(stated):
        made.groups.append(Group(("Linear",), None))
        return
    form = AUTO_ROUND_FORMS[packing]
    method = "awq" if form == "gemm" else "gptq"
    common = {**stated, "checkpoint_format": form}
    plain = [name for name, own in extra.items() if own.get("bits", 0) == 16]
    made.ignore = Patterns(plain, globs=False)
    others = {name: own for name, own in extra.items() if name not in plain}
    made.groups += [Group((name,), _words(method, {**common, **own}, made.problems)) for name, own in others.items()]
    made.groups.append(Group(("Linear",), _words(method, common, made.problems)))


def _words(method: str, stated: Mapping[str, Any], problems: list[str]) -> Words | None:
    bits, group = stated_bits(stated), stated.get("group_size", stated.get("q_group_size"))
    if bits not in (2, 3, 4, 8):
        problems.append(f"quantization_config: bits is {shown_value(stated.get('bits', stated.get('w_bit')))}, not 2, 3, 4 or 8")
        return None
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 20):
        problems.append(f"quantization_config: group_size is {shown_value(group)}, no size of a group")
        return None
    if bits == 3:
        return None
    form = str(gptq_format(stated) or "gptq").lower()
    middle = None
    if method == "gptq" and stated.get("sym") is True:
        middle = (1 << (bits - 1)) - (0 if form == "gptq_v2" else 1)
    return Words(method, bits, group, bool(stated.get("desc_act")), middle)
