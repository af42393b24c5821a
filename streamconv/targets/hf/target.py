"""A Hugging Face directory with quantized weights, for vLLM, SGLang, transformers and TensorRT-LLM's PyTorch backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from streamconv.checkpoint.dtypes import BY_TORCH_NAME, MODEL_DTYPES, DType
from streamconv.errors import CheckpointError, RefusedError, UsageError, printable
from streamconv.options import METHODS
from streamconv.targets.base import FILE, Target, option

if TYPE_CHECKING:
    from streamconv.checkpoint.codes_file import Codes
    from streamconv.checkpoint.index import Index
    from streamconv.planning.plan import Plan
    from streamconv.targets.hf.recipes import Recipe

NOTHING, KEEP = "none", "keep"
Container = Literal["compressed-tensors", "modelopt", "awq", "hf"]
CONTAINERS: tuple[Container, ...] = ("compressed-tensors", "modelopt", "awq", "hf")
ARITHMETICS = ("float32", "llm-compressor", "llm-compressor-cpu")


def _quants() -> tuple[str, ...]:
    from streamconv.targets.hf.recipes import QUANTS

    return (NOTHING, KEEP, *QUANTS)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Target):
    """Options of a quantized Hugging Face directory; every field decides bytes."""

    key: ClassVar[str] = "hf"
    raw_names: ClassVar[bool] = True
    summary: ClassVar[str] = "a quantized Hugging Face directory (vLLM, SGLang, transformers, TensorRT-LLM's PyTorch backend)"

    quant: str = option(
        NOTHING,
        "how linear layers are stored, see `list formats`; none decodes a quantized source, keep keeps its codes (in another --format)",
        choices=_quants,
        metavar="NAME",
    )
    format: str | None = option(None, "container of the quantized weights", choices=CONTAINERS, typed=str)
    group_size: int = option(128, "input channels that share a scale, in the formats with groups", least=1)
    method: str | None = option(
        None,
        "how w4a16 finds its codes: rtn (amax / 8), mse (least squared error), with --text also clip, awq and gptq;"
        " default: as the container's own tool, with --text the best that fits",
        choices=METHODS,
        typed=str,
    )
    codes: str | None = option(None, "file of codes that --text found, for --method clip, awq and gptq", typed=str, metavar=FILE)
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
    activation_ranges: str | None = option(
        None, "file of `streamconv calibrate`, for scales of activations and KV cache", typed=str, metavar=FILE
    )
    kv_cache: str | None = option(None, "type of the KV cache whose scales are stored", choices=("fp8",), typed=str)
    max_shard_size: int | None = option(None, "split the output anew, not as the source is", size=True, typed=int, least=1 << 20)

    @property
    def headline(self) -> str:
        container = f" in the container of {self.format}" if self.format else ""
        return f"Hugging Face directory, {self.quant}{container}, arithmetic {self.arithmetic}"

    def needs_ranges(self) -> str | None:
        from streamconv.targets.hf.recipes import RECIPES

        if self.kv_cache is not None:
            return f"--kv-cache {self.kv_cache}"
        calibrated = any(recipe.quant == self.quant and recipe.input_scale is not None for recipe in RECIPES)
        return f"--quant {self.quant}" if calibrated else None

    def without_effect(self, given: Collection[str], source: Callable[[], Index]) -> Iterator[str]:
        from streamconv.targets.hf.recipes import without_effect

        return without_effect(self.quant, None if self.quant == KEEP else self._recipe(), given)

    def plan(self, index: Index) -> Plan:
        from streamconv.checkpoint.index import source_files
        from streamconv.checkpoint.quantized import left_over
        from streamconv.checkpoint.source_tensors import SourceTensors
        from streamconv.checkpoint.unknown_statements import refuse_unknown
        from streamconv.planning.draft import Draft
        from streamconv.planning.plan import Plan
        from streamconv.targets.hf.complete import check_complete
        from streamconv.targets.hf.layout import Layout
        from streamconv.targets.hf.rules import check_patterns
        from streamconv.targets.hf.stored import stored_weights
        from streamconv.targets.hf.units import kinds

        self.check_values()
        check_patterns(self.ignore, "--ignore")
        check_patterns(self.only, "--only")
        if index.assembled is not None:
            raise CheckpointError("a checkpoint in Meta's layout has no Hugging Face names", hint="convert it with transformers first")
        if self.quant != KEEP:
            refuse_unknown(index, "--quant keep keeps codes and statement; else convert the model that it was made from")
        units = kinds(index.tensors.told())
        odd = check_complete(index, units)
        draft, settled, dtype = Draft(SourceTensors(index)), self, self.model_dtype(index)
        codes: Codes | None = None
        ranges = self.ranges()
        if self.quant == KEEP:
            if self.kv_cache is not None:
                raise UsageError("--kv-cache: --quant keep adds no scales")
            from streamconv.targets.hf.keep import describe_kept

            describe_kept(index, self, units, draft)
        else:
            recipe = self._recipe()
            if self.method is not None and (recipe is None or self.method not in recipe.methods):
                raise UsageError(f"--method {self.method}: --quant {self.quant} has no choice of scales", hint="it is for --quant w4a16")
            settled = dataclasses.replace(self, format=recipe.container if recipe else None)
            if self.kv_cache is not None and (recipe is None or recipe.stated):
                raise UsageError("--kv-cache: only quantized directories of compressed-tensors and ModelOpt hold scales of the cache")
            if self.method is not None or self.codes is not None:
                from streamconv.checkpoint.codes_file import codes_of

                codes = codes_of(self.method, self.codes)
            stored = stored_weights(index, dtype, units, sound=not self.allow_nonfinite)
            draft = Draft(stored)
            layout = Layout(index, stored, settled, recipe, draft, dtype, ranges, codes)
            layout.describe()
            if codes is not None:
                draft.decisions["codes"] = codes.losses().line()
            if layout.refused:
                raise RefusedError(layout.refused)
        files, matrices, spans, constants = draft.finish()
        return Plan(
            family=_architecture(index),
            target=settled,
            dtype=dtype,
            side_files=tuple(draft.side_files),
            files=tuple(files),
            matrices=matrices,
            spans=spans,
            constants=tuple(constants),
            sources=(*source_files(index), *(file.identity() for file in (ranges, codes) if file is not None)),
            warnings=(*filter(None, [left_over(index)]), *odd, *draft.warnings, *index.notes, *index.left_behind),
            decisions=draft.decisions,
            losses=None if codes is None else codes.losses(),
            beside=tuple(file.shard for file in (ranges, codes) if file is not None),
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

    def model_dtype(self, index: Index) -> DType:
        """What decoded weights become: --dtype, else what the config says, else bfloat16."""
        if self.dtype != "auto":
            return MODEL_DTYPES[self.dtype]
        for config in (index.config, index.config.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                name = config.get(key) if isinstance(config, dict) else None
                if isinstance(name, str) and name in MODEL_DTYPES:
                    return MODEL_DTYPES[name]
        return BY_TORCH_NAME["bfloat16"]


def _architecture(index: Index) -> str:
    """What config.json calls the model."""
    names = index.config.get("architectures")
    return printable(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else "model"
