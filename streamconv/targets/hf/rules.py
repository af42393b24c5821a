"""Which weights of any model are quantized, decided by names and shapes alone: no family table."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streamconv.errors import UsageError, printable

PARTNERS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq_a", "wkv_a_with_mqa"),
)
"""Last names of the modules that engines join to one matrix: all of a group are quantized alike, or none."""

EMBEDDING = "embedding"
NOT_LINEAR = (EMBEDDING, "not a linear layer")
"""Reasons of what is no nn.Linear, the only module that readers quantize: whoever asks for it would get codes that are read as floats."""

_EMBEDDING = re.compile(r"(^|\.)([a-z0-9_]*embed[a-z0-9_]*|wte|wpe)$")
_HEAD = re.compile(r"(^|\.)(lm_head|head|output|embed_out|score|classifier)$")
_ROUTER = re.compile(r"(^|\.)(gate|[a-z_]*router|gating|gate_network|shared_expert_gate|router_proj|gate\.wg|switch)$|\.router\.")
_OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision[a-z_]*|image[a-z_]*|audio[a-z_]*|speech[a-z_]*|patch_embed[a-z_]*|[a-z_]*projector|connector|aligner|resampler"
    r"|merger|vit|sam_model|qformer|embed_(vision|audio))(\.|$)|^mlp1\."
)
_NORM = re.compile(r"norm[0-9a-z_]*$|(^|\.)ln_[0-9a-z]+$")
_NOT_LINEAR = re.compile(r"(^|\.)(conv[0-9a-z_]*|rotary_emb|relative_attention_bias|[a-z_]*position[a-z_]*)$")


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """A weight that is, or looks like, that of a linear layer; or the first of those whose layers or experts hold the same.

    Attributes:
        name: full name without ".weight".
        rows, cols: output and input features.
        reason: why it is left as it is; "" if it is to be quantized.
    """

    name: str
    rows: int
    cols: int
    reason: str = ""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is one of `patterns`: exact, a shell glob, or `re:` and a regular expression matched from the start."""
    return any(re.match(p[3:], name) is not None if p.startswith("re:") else fnmatch.fnmatchcase(name, p) for p in patterns)


@lru_cache(4096)
def is_other_part(name: str) -> bool:
    """Whether a module belongs to the vision tower, the audio encoder or what connects them."""
    return _OTHER_PARTS.search(name) is not None


def part_of(name: str) -> str:
    """The last name of the vision tower, audio encoder or projector that a module belongs to; "" if it belongs to none."""
    match = _OTHER_PARTS.search(name)
    return match[0].strip(".") if match is not None else ""


def check_patterns(patterns: Sequence[str], flag: str) -> None:
    """Every pattern can be used.

    Raises:
        UsageError: a regular expression that is none.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"{flag} {printable(pattern)}: not a regular expression: {error}") from None


def default_reason(name: str) -> str:
    """Why a 2-D weight of this module is left unquantized by default; "" if it is quantized."""
    if is_other_part(name):
        return "not part of the language model"
    if _HEAD.search(name):
        return "output projection"
    if _EMBEDDING.search(name):
        return EMBEDDING
    if "embed" in name:  # a linear layer, which readers must be told of
        return "part of an embedding"
    if _ROUTER.search(name):
        return "router"
    if _NORM.search(name) or _NOT_LINEAR.search(name):
        return "not a linear layer"
    return ""


def classify(shapes: Mapping[str, tuple[int, ...]], ignore: Sequence[str], only: Sequence[str]) -> list[Module]:
    """The fate of every 2-D `X.weight`.

    Args:
        shapes: tensor name -> shape, of the floating-point tensors.
        ignore: patterns of modules to leave as they are, beside those left by default.
        only: patterns of the modules to quantize, linear layers left by default too; none of the others.

    Returns:
        In the order of `shapes`. Nothing that is left by default has been asked for with `only`.
    """
    modules = []
    for tensor, shape in shapes.items():
        if len(shape) != 2 or not tensor.endswith(".weight"):
            continue
        name = tensor[: -len(".weight")]
        reason = default_reason(name)
        if only and reason not in NOT_LINEAR:
            reason = "" if matches(name, only) else "not named by --only"
        if matches(name, ignore):
            reason = "named by --ignore"
        modules.append(Module(name, *shape, reason))
    return modules


def partners(name: str) -> tuple[str, ...]:
    """Names of the modules that engines join with this one, itself too, in order; () if there are none."""
    stem, _, last = name.rpartition(".")
    for group in PARTNERS:
        if last in group:
            return tuple(f"{stem}.{other}" if stem else other for other in group)
    return ()


def split_groups(modules: Sequence[Module]) -> list[str]:
    """What engines would refuse: groups of partners of which only some are to be quantized, one line each."""
    fate = {module.name: module.reason for module in modules}
    lines, seen = [], set[tuple[str, ...]]()
    for module in modules:
        group = tuple(name for name in partners(module.name) if name in fate)
        if group in seen or len({bool(fate[name]) for name in group}) < 2:
            continue
        seen.add(group)
        left = [name for name in group if fate[name]]
        lines.append(
            f"{printable(left[0])} would stay as it is ({fate[left[0]]}) while its partners are quantized:"
            f" engines join {', '.join(printable(name.rpartition('.')[2]) for name in group)} to one matrix"
        )
    return lines


_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def starred(name: str) -> str:
    """A name with layer and expert numbers as *."""
    return _LAYER.sub("*", name)
