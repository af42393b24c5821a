"""config.json of a multimodal model: the part that is about its language model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from streamconv.checkpoint.model_config import MODEL_TYPES
from streamconv.errors import CheckpointError, printable

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
    names = config.get("architectures")
    outer = names[0] if isinstance(names, list) and names else None
    key = next((key for key in _KEYS if isinstance(config.get(key), dict)), None)
    if not isinstance(outer, str) or key is None or (outer in known and "hidden_size" in config):
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


def _architecture(inner: Mapping[str, Any], model_type: str, known: Collection[str]) -> str | None:
    named = inner.get("architectures")
    if isinstance(named, list) and named and named[0] in known:
        return str(named[0])
    return next((architecture for architecture, kind in MODEL_TYPES.items() if kind == model_type and architecture in known), None)


def _refused(outer: str, architecture: str | None, model_type: str) -> CheckpointError:
    what = f"{printable(model_type)} language model" if model_type else "language model"
    known = ", ".join(_WRAPPERS)
    if architecture is None:
        return CheckpointError(
            f"config.json: {printable(outer)} is a multimodal model around a {what}, of which nothing is known here",
            hint=f"the language models inside {known} are converted",
        )
    return CheckpointError(
        f"config.json: {printable(outer)} is a multimodal model around a {what} ({architecture}); it is not converted as a whole",
        hint=f"save the language model alone as {architecture}, and convert that (it is taken out of {known})",
    )
