"""What a config must say of modules that are left as they are, so that every reader knows them by the names that it has for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from streamconv.natural import natural
from streamconv.targets.hf.model_types import Sizes, text_config
from streamconv.targets.hf.rules import NOT_LINEAR, default_reason, part_of
from streamconv.targets.hf.stored import Stored

_INSIDE = "language_model.model."
"""Where checkpoints of wrappers have the language model that transformers has in `model.language_model`."""
_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


def ignored(left: Collection[str], quantized: Collection[str], container: str) -> list[str]:
    """The list that the config holds, sorted: names, and a pattern for each part beside the language model, whose modules some readers
    have below `model.`, or without a level that the files have.

    Args:
        left: modules that stay floats.
    """
    names = {name for name in left if default_reason(name) not in NOT_LINEAR}
    names |= {"lm_head"} - set(quantized)
    parts = {part_of(name) for name in names} - {""}
    parts -= {part_of(name) for name in quantized} if parts else set()
    if container == "compressed-tensors":
        names |= {rf"re:.*\b{re.escape(part)}\..*" for part in parts}
    elif container == "modelopt":
        names |= {f"*{part}.*" for part in parts}
    else:
        names |= {prefix + part for part in parts for prefix in ("", "model.")}
    names |= {f"model.language_model.{name[len(_INSIDE) :]}" for name in names if name.startswith(_INSIDE)}
    return sorted(names, key=natural)


def tied_heads(stored: Stored, config: Mapping[str, Any]) -> Iterator[str]:
    """Output projections that are no tensor, because they are the embedding: a bias for each token of the vocabulary has no weight."""
    vocab = vocabulary(config)
    for name in stored.order:
        if name.endswith(".bias") and not _NUMBER.search(name) and stored.form(name).shape == (vocab,):
            module = name.removesuffix(".bias")
            if f"{module}.weight" not in stored.order:
                yield from (module, f"{module}.decoder")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether readers take the embedding for the output projection, stored or not."""
    values = (part.get("tie_word_embeddings") for part in (config, text_config(config)))
    return next((tied for tied in values if tied is not None), None) is True


def is_head(name: str) -> bool:
    """The output projection of a language model."""
    return name.rpartition(".")[2] == "lm_head"


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """Tokens of the model, as far as its config says."""
    return Sizes(text_config(config)).of("vocab_size")


def is_table(name: str, rows: int, vocab: int | None) -> bool:
    """A matrix with a row for each token that is of no layer: an embedding or an output projection, whatever it is called."""
    return rows == vocab and not _NUMBER.search(name)
