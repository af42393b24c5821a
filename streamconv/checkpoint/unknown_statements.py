"""What a quantization_config states of its weights and nothing here applies: with such a statement the codes mean other weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.quantized import AUTO_ROUND, AUTO_ROUND_FORMS, source_quantization, statement
from streamconv.checkpoint.untrusted import shown_value
from streamconv.errors import RefusedError, printable

METHODS = ("aqlm", "bitnet", "bitsandbytes", "eetq", "fp_quant", "higgs", "hqq", "inc", "nvfp4", "quanto", "quark", "quip", "spqr",
           "torchao", "vptq")  # fmt: skip
"""Methods that engines read and that are not known here."""
FORMATS = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "dense", "mixed-precision")
"""Formats of compressed-tensors that engines read and that are not known here."""
_TRANSFORMS = ("transform_config", "rotation_config", "hadamard_config", "rotation")
"""Rotations that an engine applies to activations, of which the weights hold the inverse: compressed-tensors, AutoRound, GPTQModel."""


def transforms(config: Mapping[str, Any]) -> list[str]:
    """Transforms of the weights: they count whether or not a tensor is quantized."""
    keys = [key for key in _TRANSFORMS if config.get(key) not in (None, False, "", {}, [])]
    return [f"quantization_config: {key} states transforms of the weights, which are not known here" for key in keys]


def unknown_statements(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Statements that change what the weights mean and are not known here, one line each; verify, conversion and import share this list."""
    method, lines = config.get("quant_method"), transforms(config)
    if isinstance(method, str) and method in METHODS:
        lines.append(f"quantization_config: quant_method is {printable(method)}, which is not known here")
    groups = config.get("config_groups")
    own = [group.get("format") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    if method == "compressed-tensors":
        forms = dict.fromkeys(str(form or config.get("format")) for form in own)
        lines += [f"quantization_config: format is {form}, which is not known here" for form in forms if form in FORMATS]
    if method in AUTO_ROUND and not in_known_words(config):
        which = f"packing_format {shown_value(config.get('packing_format'))} and data_type {shown_value(config.get('data_type'))}"
        lines.append(f"quantization_config: {which} of auto-round are not known here")
    if overrides(config):
        lines.append("quantization_config: dynamic states other bits or groups for some modules (GPTQModel), which are not known here")
    layouts = [config.get(key) for key in ("checkpoint_format", "format") if config.get(key) is not None]
    if method == "gptq" and len({str(form).lower() for form in layouts}) > 1:
        which = f"checkpoint_format is {shown_value(layouts[0])}, and format {shown_value(layouts[1])}"
        lines.append(f"quantization_config: {which}: which of them counts is not known here")
    if method == "compressed-tensors" and stored_sparse(names):
        lines.append("weights are stored sparse, with masks (bitmask), which is not known here")
    return lines


def overrides(config: Mapping[str, Any]) -> bool:
    """GPTQModel quantized some modules otherwise: a regular expression -> what is different; with "-:" before it, not at all."""
    dynamic = config.get("dynamic") if config.get("quant_method") == "gptq" else None
    if not isinstance(dynamic, Mapping):
        return bool(dynamic)
    return any(own not in ({}, None) for key, own in dynamic.items() if not str(key).startswith("-:"))


def stored_sparse(names: Collection[str]) -> bool:
    """Weights are stored with masks of their zeros."""
    return any(name.endswith(".bitmask") for name in names)


def in_known_words(config: Mapping[str, Any]) -> bool:
    """AutoRound has the layout of GPTQ or AutoAWQ."""
    packing, extra = config.get("packing_format", "auto_round:auto_gptq"), config.get("extra_config") or {}
    known = isinstance(packing, str) and packing in AUTO_ROUND_FORMS and config.get("data_type", "int") == "int"
    return known and isinstance(extra, dict) and all(isinstance(part, dict) for part in extra.values())


def stated_by(index: Index) -> list[str]:
    """What is not known here of a source; of one that holds floats alone, transforms."""
    config = statement(index.config, index.root)
    if config is None:
        return []
    return transforms(config[0]) if source_quantization(index) is None else unknown_statements(config[0], index.tensors)


def refuse_unknown(index: Index, hint: str) -> None:
    """Before weights of a source are decoded, imported or put into another container.

    Raises:
        RefusedError: its statement says more of them than is known here.
    """
    lines = stated_by(index)
    if lines:
        why = "its" if source_quantization(index) is None else "the source is already quantized, and its"
        raise RefusedError([f"{line}: {why} weights would be taken for others" for line in lines], hint=hint)
