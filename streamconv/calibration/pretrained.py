"""The one door to transformers: what a model folder says is data, and never names code, kernels, or anything on the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.errors import BudgetError, CheckpointError, StreamconvError, TensorError, printable
from streamconv.families import Family
from streamconv.families.matching import example, match
from streamconv.lazy import torch

_ATTENTION = ("sdpa", "eager")
"""In transformers' own order: the ranges are those of the model as it runs there by default."""

_NAMES_CODE = ("attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "use_kernels")
"""Keys of config.json that make transformers load code or kernels; those that begin with `_` are its own business, too."""


def read_config(index: Index, model: ModelConfig, family: Family) -> Any:
    """The transformers configuration of a source, from its config.json.

    A model_type that is called as the family may run as another architecture there: Exaone's is Llama's, and InternLM's is made so.

    Raises:
        CheckpointError: the model is none that transformers has, or config.json does not describe it.
        TensorError: config.json speaks of more layers than there are.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, where = family.runs_as or index.config.get("model_type") or model.model_type, printable(index.root)
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    if not isinstance(kind, str) or built is None or (built != model.architecture and kind not in (family.name, family.runs_as)):
        raise CheckpointError(
            f"{where}: transformers has no {printable(model.architecture)} of model_type {printable(kind)}",
            hint="calibration runs transformers' own models only, no code that a model brings along",
        )
    last = model.num_hidden_layers - 1
    if not any(layer == last for _, layer, _ in match(family, index.tensors)[0]):
        norm = example(family, "input_norm", last, -1)
        raise TensorError(f"config.json says {model.num_hidden_layers} layers, and the source has no tensor like {norm}")
    with offline(), told(f"{where}: transformers cannot read config.json"):
        config = {key: value for key, value in index.config.items() if not key.startswith("_") and key not in _NAMES_CODE}
        if family.runs_as:
            config |= {"model_type": kind, "rope_theta": model.rope_theta}
            config |= {"attention_bias": model.attention_bias, "mlp_bias": model.mlp_bias}
        return CONFIG_MAPPING[kind].from_dict(config)


def architecture(config: Any) -> str:
    """The class that transformers runs a configuration with."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a configuration on the meta device, with the attention that transformers takes by default."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    with offline(), torch.device("meta"):
        for name in _ATTENTION:
            try:
                return build.from_config(config, dtype=dtype, attn_implementation=name, trust_remote_code=False)
            except (ValueError, ImportError):  # this model has no such attention
                if name == _ATTENTION[-1]:
                    raise
    raise AssertionError("no attention")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, that pads on the left. Raises CheckpointError: there is none that can be read."""
    from transformers import AutoTokenizer

    hint = "calibration needs the tokenizer files beside the model"
    with offline(), told(f"{printable(folder)} has no tokenizer that can be read", hint):
        return AutoTokenizer.from_pretrained(str(folder), padding_side="left", local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def told(what: str, hint: str | None = None) -> Iterator[None]:
    """Whatever a library makes of a model's files is the model's fault: a CheckpointError in one line.

    A lack of memory stays what it is, and so does an interruption; a panic of the tokenizers' Rust is no Exception.

    Raises:
        CheckpointError: `what`, and the library's first line. BudgetError: see `on_device`.
    """
    try:
        with on_device():
            yield
    except (StreamconvError, MemoryError):
        raise
    except BaseException as error:
        name, first = type(error).__name__, _first_line(error)
        if isinstance(error, Exception) or name == "PanicException":
            raise CheckpointError(f"{what}: {first}", hint=hint) from error
        raise


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """The device's lack of memory is the user's to mend. Raises BudgetError: a device ran out of memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(
            f"the device ran out of memory in the calibration: {_first_line(error)}",
            hint="a smaller --batch-size or --max-length, or --device cpu",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No library asks the Hub: the files are here, and a config may name others."""
    from huggingface_hub import constants
    from transformers.utils import hub

    switches = ((constants, "HF_HUB_OFFLINE"), (hub, "_is_offline_mode"))  # the second: transformers 4
    before = [(module, name, getattr(module, name)) for module, name in switches if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
