"""A Hugging Face directory with quantized weights, for vLLM, SGLang, transformers and TensorRT-LLM's PyTorch backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from streamconv.checkpoint.dtypes import BY_TORCH_NAME, MODEL_DTYPES, DType
from streamconv.errors import CheckpointError, RefusedError, UsageError, printable
from streamconv.targets.base import Target, option

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.planning.plan import Plan
    from streamconv.targets.hf.recipes import Recipe

NOTHING = "none"
Container = Literal["compressed-tensors", "modelopt", "hf"]
CONTAINERS: tuple[Container, ...] = ("compressed-tensors", "modelopt", "hf")
ARITHMETICS = ("float32", "llm-compressor", "llm-compressor-cpu")


def _quants() -> tuple[str, ...]:
    from streamconv.targets.hf.recipes import QUANTS

    return (NOTHING, *QUANTS)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Target):
    """Options of a quantized Hugging Face directory; every field decides bytes."""

    key: ClassVar[str] = "hf"
    raw_names: ClassVar[bool] = True
    summary: ClassVar[str] = "a quantized Hugging Face directory (vLLM, SGLang, transformers, TensorRT-LLM's PyTorch backend)"

    quant: str = option(
        NOTHING,
        "how linear layers are stored, see `list targets`; none re-saves, and decodes a quantized source",
        choices=_quants,
        metavar="NAME",
    )
    format: str | None = option(None, "container of the quantized weights", choices=CONTAINERS, typed=str)
    group_size: int = option(128, "input channels that share a scale, in the formats with groups", least=1)
    arithmetic: str = option(
        "float32",
        "of scales and quotients: float32 is the most accurate, the others give the bytes of llm-compressor on a GPU or a CPU",
        choices=ARITHMETICS,
    )
    dtype: str = option("auto", "type of what is decoded or not quantized; auto is the source's", choices=("auto", *MODEL_DTYPES))
    ignore: tuple[str, ...] = option(
        (), "modules left as they are: full names, globs, or re: and a regular expression; several may follow", metavar="MODULE"
    )
    only: tuple[str, ...] = option((), "the modules to quantize, and no others: as --ignore", metavar="MODULE")
    max_shard_size: int | None = option(None, "split the output anew, not as the source is", size=True, typed=int, least=1 << 20)

    @property
    def headline(self) -> str:
        container = f" in the container of {self.format}" if self.format else ""
        return f"Hugging Face directory, {self.quant}{container}, arithmetic {self.arithmetic}"

    def without_effect(self, given: Collection[str], source: Callable[[], Index]) -> Iterator[str]:
        from streamconv.targets.hf.effects import without_effect

        return without_effect(self._recipe(), given)

    def plan(self, index: Index) -> Plan:
        from streamconv.checkpoint.source_files import source_files
        from streamconv.checkpoint.source_tensors import SourceTensors
        from streamconv.planning.draft import Draft
        from streamconv.planning.plan import Plan
        from streamconv.targets.hf.layout import Layout
        from streamconv.targets.hf.rules import check_patterns

        self.check_values()
        check_patterns(self.ignore, "--ignore")
        check_patterns(self.only, "--only")
        if index.assembled is not None:
            raise CheckpointError("a checkpoint in Meta's layout has no Hugging Face names", hint="convert it with transformers first")
        recipe = self._recipe()
        settled = dataclasses.replace(self, format=recipe.container if recipe else None)
        draft = Draft(SourceTensors(index))
        layout = Layout(index, settled, recipe, draft, self._model_dtype(index))
        layout.describe()
        if layout.refused:
            raise RefusedError(layout.refused)
        files, matrices, spans, constants = draft.finish()
        return Plan(
            family=_architecture(index),
            target=settled,
            dtype=layout.into,
            side_files=tuple(draft.side_files),
            files=tuple(files),
            matrices=matrices,
            spans=spans,
            constants=tuple(constants),
            sources=source_files(index),
            warnings=(*draft.warnings, *index.notes),
            decisions=draft.decisions,
        )

    def _recipe(self) -> Recipe | None:
        from streamconv.targets.hf.recipes import RECIPES, recipe_of

        if self.quant == NOTHING:
            if self.format is not None:
                raise UsageError("--format is for quantized weights: --quant none has none")
            return None
        recipe = recipe_of(self.quant, self.format)
        if recipe is None:
            there = [r.container for r in RECIPES if r.quant == self.quant]
            raise UsageError(f"--quant {self.quant} has no --format {self.format}", hint=f"it has {' and '.join(there)}")
        return recipe

    def _model_dtype(self, index: Index) -> DType:
        """What decoded weights become: --dtype, else what the config says, else bfloat16."""
        if self.dtype != "auto":
            return MODEL_DTYPES[self.dtype]
        for config in (index.config, index.config.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                stated = config.get(key) if isinstance(config, dict) else None
                if isinstance(stated, str) and stated in MODEL_DTYPES:
                    return MODEL_DTYPES[stated]
        return BY_TORCH_NAME["bfloat16"]


def _architecture(index: Index) -> str:
    """What config.json calls the model."""
    names = index.config.get("architectures")
    return printable(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else "model"
