"""A source under the names that the family tables know: without prefixes of wrappers, of a multimodal model its language model alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from streamconv.checkpoint.foreign import MERGE, unmerged
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import MODEL_TYPES, is_tied
from streamconv.checkpoint.tensor_table import TensorTable
from streamconv.errors import CheckpointError, TensorError, printable
from streamconv.families import Family, all_families

_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
_WRAPPERS = {
    "Mistral3ForConditionalGeneration": "mistral",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
}
"""Those that are converted -> the model type that a text_config without one has."""

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Sizes that a text_config leaves out where they are those of transformers' class, as LLaVA-1.5 does."""


def language_model(config: dict[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The config of the language model inside a multimodal model, and a note; any other config as it is.

    Args:
        known: architectures of language models that can be converted.

    Raises:
        CheckpointError: a multimodal model of a kind that is not converted; names the language model inside.
    """
    outer, key = _stated(config), next((key for key in _KEYS if isinstance(config.get(key), dict)), None)
    if outer is None or key is None or (outer in known and "hidden_size" in config):
        return config, []
    inner = dict(config[key])
    model_type = str(inner.get("model_type") or _WRAPPERS.get(outer, ""))
    architecture = outer if outer in known else _architecture(inner, model_type, known)
    if outer not in known and outer not in _WRAPPERS:
        raise _refused(outer, architecture, model_type)
    if architecture is None:
        kind = printable(model_type) or "not named"
        raise CheckpointError(f"config.json: the language model inside {outer} is {kind}, which is not known")
    inner = _CLASS_DEFAULTS.get(model_type, {}) | inner
    inherited = ["quantization_config", "tie_word_embeddings"]
    if not any(inner.get(dtype) for dtype in ("torch_dtype", "dtype")):
        inherited += ["torch_dtype", "dtype"]
    inner = {name: config[name] for name in inherited if config.get(name) is not None} | inner
    inner |= {"architectures": [architecture], "model_type": model_type}
    return inner, [f"of {outer} the language model is converted, {architecture}"]


def _stated(config: Mapping[str, Any]) -> str | None:
    """`architectures[0]`."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _architecture(inner: Mapping[str, Any], model_type: str, known: Collection[str]) -> str | None:
    named = _stated(inner)
    if named in known:
        return named
    return next((architecture for architecture, kind in MODEL_TYPES.items() if kind == model_type and architecture in known), None)


def _refused(outer: str, architecture: str | None, model_type: str) -> CheckpointError:
    what = f"{printable(model_type)} language model" if model_type else "language model"
    known = ", ".join(_WRAPPERS)
    message = f"config.json: {printable(outer)} is a multimodal model around a {what}"
    if architecture is None:
        return CheckpointError(f"{message}, of which nothing is known here", hint=f"the language models inside {known} are converted")
    hint = f"save the language model alone as {architecture}, and convert that (it is taken out of {known})"
    return CheckpointError(f"{message} ({architecture}); it is not converted as a whole", hint=hint)


_MARKERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and Lightning put into names, at any depth; no model has such a module."""

_INSIDE = (
    ("model.language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
)
"""Where the releases of transformers put the language model of a multimodal one, and its output projection."""

_OUTSIDE = ("module.", "base_model.model.", "base_model.")
"""Prefixes around a whole multimodal model."""


def settle(index: Index) -> Index:
    """The source with the names and the config of the language model alone; notes say what was changed.

    Raises:
        CheckpointError: a multimodal model of a kind that is not converted.
        TensorError: the names are behind a prefix that cannot be taken off safely, or a LoRA adapter is not merged.
    """
    if index.assembled is not None or index.views:
        return index
    config, notes = language_model(index.config, {a for family in all_families() for a in family.architectures})
    wrapped = config is not index.config
    family = next((family for family in all_families() if _stated(config) in family.architectures), None)
    if family is None:
        return index
    lora = unmerged(index.tensors)
    if lora is not None:
        raise TensorError(f"{printable(lora)}: a LoRA adapter lies beside the weights and is not merged into them", hint=MERGE)
    new = {name: _MARKERS.sub("", name) for name in index.tensors} if any(map(_MARKERS.search, index.tensors)) else {}
    if new:
        count = sum(old != name for old, name in new.items())
        notes.append(f"the names of {count} tensors hold wrappers such as _orig_mod., which are left out")
    names = list(new.values()) or list(index.tensors)
    moved, more = _inside(names) if wrapped else _behind(names, family)
    if moved is not None:
        new = {old: moved[name] for old, name in zip(index.tensors, names, strict=True) if name in moved}
    tensors = _renamed(index.tensors, new) if new else index.tensors
    outer = index.config.get("tie_word_embeddings") is True  # it is the wrapper's that transformers obeys
    if wrapped and outer and config.get("tie_word_embeddings") is False and "lm_head.weight" not in tensors:
        config = config | {"tie_word_embeddings": True}
        notes.append("there is no lm_head.weight: it is the embedding, as the config of the whole model says (tie_word_embeddings)")
    head = _tied_head(config, family, tensors)
    if head is not None:
        tensors = _renamed(tensors, {name: family.tensors["embedding"][0] if name == head else name for name in tensors})
        more = [*more, f"{head} is the embedding, to which config.json ties it (tie_word_embeddings)"]
    unlisted = frozenset(new.get(name, name) for name in index.unlisted)
    return dataclasses.replace(index, config=config, tensors=tensors, unlisted=unlisted, notes=(*index.notes, *notes, *more))


def _renamed(tensors: TensorTable, new: Mapping[str, str]) -> TensorTable:
    table = TensorTable()
    for old, name in new.items():
        if name in table:
            message = f"{printable(old)} and another tensor are both {printable(name)} without their wrappers"
            raise TensorError(message, hint="remove one of them")
        table.take(tensors[old], name)
    return table


def _inside(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Names of the language model of a multimodal model -> its own names; the others are left out."""
    notes = []
    common = next((prefix for prefix in _OUTSIDE if all(name.startswith(prefix) for name in names)), "")
    if common:
        notes.append(f"all tensor names begin with {common}, which is left out")
    bare = {name: name.removeprefix(common) for name in names}
    inside = {name: next((pair for pair in _INSIDE if bare[name].startswith(pair[0])), None) for name in names}
    moved = {name: pair[1] + bare[name].removeprefix(pair[0]) for name, pair in inside.items() if pair is not None}
    if len(moved) < len(names):
        notes.append(f"{len(names) - len(moved)} tensors outside of the language model are left out")
    return moved, notes


def _behind(names: Sequence[str], family: Family) -> tuple[dict[str, str] | None, list[str]]:
    """Names behind a common prefix -> the names that the family knows; None if there is nothing to do."""
    present = set(names)
    if any(pattern in present for role in ("embedding", "final_norm") for pattern in family.tensors.get(role, ())):
        return None, []
    heads = {pattern.split("{")[0] for patterns in family.tensors.values() for pattern in patterns}
    own, prefixes = "", Counter(prefix for name in names if (prefix := _before(name, heads)))
    if not prefixes:  # the inner model alone: no "model." before the layers
        own = "model."
        inner = {head.removeprefix(own) for head in heads if head.startswith(own)}
        prefixes = Counter(prefix for name in names if (prefix := _before(name, inner)) is not None)
    if not prefixes:
        return None, []
    prefix = max(prefixes, key=lambda text: prefixes[text])
    outside = [name for name in names if not name.startswith(prefix)]
    if own and prefix == "":
        moved = {name: name if name.startswith("lm_head.") else own + name for name in names}
        return moved, ["the tensor names lack the model. of a causal language model, which is added"]
    if outside:
        raise TensorError(
            f"the model's tensors are behind the prefix {printable(prefix)}, but {len(outside)} of {len(names)} tensors are not,"
            f" for example {printable(outside[0])}",
            hint="take the prefix off, and remove what is not part of the model",
        )
    moved = {name: own + name.removeprefix(prefix) for name in names}
    return moved, [f"all tensor names begin with {printable(prefix)}, which is left out"]


def _before(name: str, heads: Collection[str]) -> str | None:
    """What stands before the first of these beginnings in a name, None if the name holds none of them."""
    for head in heads:
        if name.startswith(head):
            return ""
        at = name.find("." + head)
        if at >= 0:
            return name[: at + 1]
    return None


def _tied_head(config: Mapping[str, object], family: Family, tensors: TensorTable) -> str | None:
    """The lm_head of a tied model that stores its one matrix under this name; None for any other."""
    if not is_tied(config) or any(name in tensors for name in family.tensors["embedding"]):
        return None
    return next((name for name in family.tensors.get("lm_head", ()) if name in tensors), None)
