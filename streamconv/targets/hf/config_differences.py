"""What config.json tells an engine to compute, against the source's: the weights may be right and the model another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from streamconv.errors import printable
from streamconv.targets.checks import SHOWN, Told, flat, line, rope_scaling
from streamconv.targets.hf.model_types import text_config

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_BOOKKEEPING = re.compile(
    r"_.*|.*dtype|.*(dropout|_pdrop|_token_id|_loss_coef|_loss|_implementation)|transformers_version|quantization_config|auto_map|use_cache"
    r"|initializer_range|output_(attentions|hidden_states|router_logits)|return_dict.*|torchscript|id2label|label2id|problem_type"
    r"|pretraining_tp|tokenizer_class|task_specific_params|gradient_checkpointing|router_jitter_noise|name_or_path|layer_types"
)
"""Keys that no logit depends on, or that releases of transformers derive from others; types of weights are compared by themselves."""
_FILLED = ("head_dim", "num_key_value_heads", "hidden_activation")
"""What transformers computes where the source says null."""


def config_differences(config: Mapping[str, Any], source: Mapping[str, Any]) -> Told:
    """Problems and warnings of a Hugging Face directory: other values than the source's, and keys that the source alone has.

    Args:
        source: that of a Hugging Face source.
    """
    own, theirs = text_config(config), text_config(source)
    held, wanted = _facts(own), _facts(theirs)
    if (own is config) == (theirs is source):
        held |= {key: value for key, value in _facts(config).items() if not key.startswith("rope.")} if own is not config else {}
        wanted |= {key: value for key, value in _facts(source).items() if not key.startswith("rope.")} if theirs is not source else {}
    else:  # the language model alone, or put back into a wrapper
        for facts in (held, wanted):
            facts.pop("architectures", None)
            facts.pop("model_type", None)
    if theirs.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers"):
            wanted.pop(key, None)
    wanted = {key: value for key, value in wanted.items() if value is not None or key not in _FILLED}
    lost = [key for key, value in wanted.items() if key not in held and value is not None]
    problems = [line(key, held[key], value, "in the source") for key, value in wanted.items() if key in held and held[key] != value]
    told = f"config.json lacks {', '.join(map(printable, lost[:5]))}{' and others' if len(lost) > 5 else ''}, which the source's has"
    return problems[:SHOWN], [told] if lost else []


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config that count, those of inner objects with a dot; both spellings of rotary embedding are one."""
    inner = {key: value for key, value in config.items() if key not in _ROPE and value is not text_config(config)}
    told = {key: value for key, value in flat(inner, "") if not any(_BOOKKEEPING.fullmatch(part) for part in key.split("."))}
    return told | dict(flat(_rope(config), "rope."))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    new, old = (value if isinstance(value := config.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling"))
    if any(isinstance(value, dict) for value in new.values()):
        return {key: rope_scaling(value) if isinstance(value, dict) else value for key, value in new.items()}
    scaling = rope_scaling(old if rope_scaling(old)["type"] != "default" else new)
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
        values = [of[key] for of in (new, old, config) if of.get(key) is not None]
        found |= {key: values[0]} if values else {}
    return found | scaling
