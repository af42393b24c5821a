"""Which tensors lie in which file of the output, and how each is stored."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, cast

from streamconv.checkpoint.dtypes import F32, FLOATS, I64, DType
from streamconv.checkpoint.index import Index
from streamconv.errors import printable
from streamconv.planning.draft import Draft
from streamconv.planning.matrix_table import Named
from streamconv.quants.base import Codec
from streamconv.quants.fp8_tensor import Fp8Scale, WeightMaximum
from streamconv.quants.plain import Plain
from streamconv.targets.hf import config_json
from streamconv.targets.hf.card import NAME, Done, card
from streamconv.targets.hf.fates import Fates
from streamconv.targets.hf.ignored import ignored, is_tied, tied_heads, vocabulary
from streamconv.targets.hf.recipes import BLOCK, CodecOptions, Recipe
from streamconv.targets.hf.rules import Module, partners, starred
from streamconv.targets.hf.side_files import side_files
from streamconv.targets.hf.stacked import restack, unstack
from streamconv.targets.hf.stored import Form, Stored

if TYPE_CHECKING:
    from streamconv.checkpoint.activation_ranges import Ranges
    from streamconv.checkpoint.codes_file import ApartTensor, Codes, Found
    from streamconv.targets.hf.target import HuggingFace

_METADATA = {"format": "pt"}
_ONE = {"F32": b"\0\0\x80\x3f", "F16": b"\0\x3c", "BF16": b"\x80\x3f"}


_plain = cache(Plain)


class Quantized(NamedTuple):
    """How the quantized weights of a form are stored.

    Attributes:
        number: of the form of their matrices.
        cut: letters of a module's last name, in whose place the module whose maximum it shares has `first`.
        scale: last name, and number of the form, of a scale that follows from this maximum.
    """

    number: int
    cut: int
    first: str
    scale: tuple[str, int] | None


@dataclass(slots=True)
class Layout:
    """Describes one output to a Draft.

    Attributes:
        recipe: the row of the formats table; None re-saves.
        into: float type of weights that are decoded.
        ranges: what a calibration run measured, where something needs it.
        codes: what a search found, where --method has one.
        fates: module -> what becomes of it; inputs: module -> largest input; cached: weight -> attention, k or v, largest output;
            searched: module -> its codes; changed: norm or bias -> what takes its place.
        decoded: weights of the source that are decoded.
        whole, quantized: what is known of forms of weights.
    """

    index: Index
    stored: Stored
    target: HuggingFace
    recipe: Recipe | None
    draft: Draft
    into: DType
    ranges: Ranges | None = None
    codes: Codes | None = None
    refused: list[str] = field(default_factory=list)
    fates: dict[str, Module] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)
    cached: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    searched: dict[str, Found] = field(default_factory=dict)
    changed: dict[str, ApartTensor] = field(default_factory=dict)
    decoded: int = 0
    whole: dict[Form, int] = field(default_factory=dict)
    quantized: dict[Form, Quantized] = field(default_factory=dict)

    def describe(self) -> None:
        stored, fates = self.stored, None
        if self.recipe is not None:
            unstack(stored, self.index.config)
            fates = Fates(stored, self.target, self.recipe, vocabulary(self.index.config), is_tied(self.index.config))
            self.fates, self.refused = fates.by_name, fates.refused
            if self.refused:
                return
            if self.ranges is not None:
                from streamconv.targets.hf.measured import cache_maxima, input_maxima

                shapes = {name: form.shape for name, form in zip(stored.order, stored.forms(), strict=True)}
                self.inputs = input_maxima(self.ranges, fates.wanted()) if self.recipe.input_scale is not None else {}
                self.cached = cache_maxima(self.ranges, shapes) if self.target.kv_cache is not None else {}
            if self.codes is not None:
                from streamconv.targets.hf.measured import taken

                codes = taken(self.codes, self.index, stored, fates.wanted(), self.target.group_size, self.recipe)
                self.searched, self.changed = codes
        self.decoded = stored.decoded
        apart = restack(stored, self.index.config) if self.recipe is None else []
        for name, tensors in self._files().items():
            number = self.draft.file(name, _METADATA)
            for way, some in groupby(tensors, self._way):
                way(number, [*some])
        self._say(fates, apart)
        self._side_files()

    # ---- files

    def _files(self) -> dict[str, list[str]]:
        """Output file -> names of the source's tensors that it takes, in order."""
        stored = self.stored
        sizes = (form.nbytes for form in stored.forms())
        return config_json.shards_of(self.index, zip(stored.order, stored.files(), sizes, strict=True), self.target.max_shard_size)

    def _way(self, name: str) -> Callable[[int, list[str]], None]:
        """What adds a weight, and those beside it that it adds too, to a file."""
        fate = self.fates.get(name[: -len(".weight")]) if self.fates and name.endswith(".weight") else None
        if fate is None or fate.reason:
            return self._stay
        one_by_one = name[: -len(".weight")] in self.searched or cast(Recipe, self.recipe).turned
        return self._one_by_one if one_by_one else self._quantize

    def _stay(self, file: int, names: list[str]) -> None:
        """Weights that become one tensor each."""
        forms = self.stored.forms_of(names)
        self.draft.wholes(file, names, [*map(self._whole, forms)], self._sources(names), [form.rows for form in forms])
        self._cache_scales(file, names)

    def _quantize(self, file: int, names: list[str]) -> None:
        recipe = cast(Recipe, self.recipe)
        beside = bool(recipe.input_scale or recipe.weight_shape or recipe.pre_scales)
        listed: list[tuple[str, int, int, int, str]] = []
        for name, form, source in zip(names, self.stored.forms_of(names), self._sources(names), strict=True):
            module = name[: -len(".weight")]
            known = self.quantized.get(form) or self._quantized(form, module, recipe)
            if known.scale is None:
                listed.append((module, known.number, source, form.rows, ""))
            else:
                first, (ending, scale) = module[: len(module) - known.cut] + known.first, known.scale
                key, beyond = f"amax of {first}", f"{module}.{ending}"
                self.draft.reduce_whole(source, form.rows, WeightMaximum(key))
                listed.append((module, known.number, source, form.rows, key))
                listed.append((beyond, scale, self.draft.nothing(beyond), 1, key))
            if beside:
                self._beside(file, module, form, recipe, None)
        self.draft.wholes(file, *zip(*listed, strict=True))
        self._cache_scales(file, names)

    def _quantized(self, form: Form, module: str, recipe: Recipe) -> Quantized:
        """How the weights of a form are stored, one of which is that of a module."""
        codec = self._codec(form)
        first = self._first(module, form, recipe) if codec.needs else module
        number = self.draft.form(form.rows, form.cols, codec, recipe)
        scale = self._scale(form, recipe) if codec.needs else None
        quantized = self.quantized[form] = Quantized(number, len(module.rpartition(".")[2]), first.rpartition(".")[2], scale)
        return quantized

    def _one_by_one(self, file: int, names: list[str]) -> None:
        """Weights whose codes were searched, or whose container has a row for each input channel."""
        from streamconv.targets.hf.measured import tensors_of

        recipe = cast(Recipe, self.recipe)
        for name in names:
            form, module = self.stored.form(name), name[: -len(".weight")]
            searched = self.searched.get(module)
            for role, codec, rows in tensors_of(self.stored.weights[name], form, self._codec(form), recipe, searched):
                own = f"{module}.{recipe.tensors[role]}" if role else module
                spelling = Named((rows.rows, rows.cols)) if role else recipe
                self.draft.feed(self.draft.matrix(file, own, rows.rows, rows.cols, codec, spelling=spelling), rows, 0, rows.rows)
            self._beside(file, module, form, recipe, searched)
        self._cache_scales(file, names)

    def _whole(self, form: Form) -> int:
        """Number of what stays of a form."""
        if form not in self.whole:
            self.whole[form] = self.draft.form(form.rows, form.cols, _plain(self._plain_dtype(form)), Named(form.shape))
        return self.whole[form]

    def _sources(self, names: list[str]) -> list[int]:
        """What the rows of weights are read from, by their numbers."""
        places, source = [*map(self.stored.order.__getitem__, names)], self.draft.source
        sources = [place if isinstance(place, int) else source(place.weight) for place in places]
        if not self.changed:
            return sources
        return [source(self.changed[name]) if name in self.changed else at for name, at in zip(names, sources, strict=True)]

    def _cache_scales(self, file: int, weights: list[str]) -> None:
        """Add the scales of the FP8 KV cache that stand beside k_proj and v_proj."""
        for attention, which, largest in filter(None, map(self.cached.get, weights if self.recipe is not None else ())):
            modelopt = cast(Recipe, self.recipe).container == "modelopt"
            name = f"{attention}.{which}_proj.{which}_scale" if modelopt else f"{attention}.{which}_scale"
            self.draft.constant(file, name, F32, () if modelopt else (1,), struct.pack("<f", largest / 448.0))

    def _plain_dtype(self, form: Form) -> DType:
        cast = self.index.views or (self.target.dtype != "auto" and not self.decoded)
        return self.into if cast and form.dtype.name in FLOATS else form.dtype

    def _codec(self, form: Form) -> Codec:
        """How weights of a form are stored; the key of a maximum that their scale follows from is left open."""
        recipe = cast(Recipe, self.recipe)
        lone = recipe.lone if _within_tile(form) else None
        return (lone[0] if lone else recipe.codec)(self._options(form))

    def _options(self, form: Form) -> CodecOptions:
        return CodecOptions(form.dtype, self.target.group_size, self.target.arithmetic, "", self.target.method)

    def _beside(self, file: int, module: str, form: Form, recipe: Recipe, searched: Found | None) -> None:
        """Add what stands beside codes and scales."""
        if recipe.input_scale is not None:
            suffix, of, shape = recipe.input_scale
            self.draft.constant(file, f"{module}.{suffix}", F32, shape, struct.pack("<f", of(self.inputs[module])))
        if recipe.weight_shape:
            self.draft.constant(file, f"{module}.weight_shape", I64, (2,), struct.pack("<2q", form.rows, form.cols))
        if recipe.pre_scales and not partners(module):
            self._pre_scale(file, f"{module}.{recipe.pre_scales}", form, searched)

    def _pre_scale(self, file: int, name: str, form: Form, searched: Found | None) -> None:
        if searched is None or searched.multiplier is None:
            self.draft.constant(file, name, form.dtype, (form.cols,), _ONE[form.dtype.name] * form.cols)
            return
        matrix = self.draft.matrix(file, name, form.cols, 1, Plain(form.dtype), spelling=Named((form.cols,)))
        self.draft.feed(matrix, replace(searched.multiplier, into=form.dtype), 0, form.cols)

    def _first(self, module: str, form: Form, recipe: Recipe) -> str:
        """Whose maximum a weight's scale follows from: its own, or, as that of all its partners, the first one's."""
        first = next((name for name in partners(module) if f"{name}.weight" in self.stored.order), module)
        shares = recipe.shared is not None
        if not shares and recipe.lone is not None and _within_tile(form):  # ModelOpt: if the first has only one; but experts keep their own
            shares = ".experts." not in first and _within_tile(self.stored.form(f"{first}.weight"))
        return first if shares else module

    def _scale(self, form: Form, recipe: Recipe) -> tuple[str, int]:
        """Last name and number of the form of the scale of a whole weight."""
        ending, codec = recipe.shared or ("weight_scale", recipe.lone[1] if recipe.lone and _within_tile(form) else None)
        shape = () if recipe.container == "modelopt" else (1,)
        return ending, self.draft.form(1, 1, codec(self._options(form)) if codec else Fp8Scale(""), Named(shape))

    # ---- what is told

    def _say(self, fates: Fates | None, apart: list[str]) -> None:
        for (name, reason), count in fates.grouped().items() if fates is not None else ():
            times = f" ({count})" if count > 1 else ""
            how = self.recipe.quant if self.recipe and not reason else reason
            self.draft.decisions.setdefault(name + times, how if not reason else f"left as it is: {reason}")
        if self.decoded:
            self.draft.warnings.append(
                f"{self.decoded} weights of the source are quantized; they are decoded to {self.into.torch}"
                + (" and quantized anew" if self.recipe else "")
            )
        recipe = self.recipe
        if recipe is None:
            if apart:
                self.draft.warnings.append(
                    f"{printable(apart[0])} and others: transformers reads the unquantized experts of this model type as one tensor a"
                    " layer, and would start these with random values; the source holds them apart, and so does the output"
                )
            return
        forms = zip(self.stored.order, self.stored.forms(), strict=True)
        stacked = [name for name, form in forms if len(form.shape) == 3 and ".experts." in name]
        if stacked:
            self.draft.warnings.append(
                f"{printable(stacked[0])} and {len(stacked) - 1} more hold all experts of a layer in a form that is not quantized here:"
                f" they stay {self.stored.form(stacked[0]).dtype.torch}"
            )
        partial = [(name, fate.cols) for name, fate in self.fates.items() if recipe.tiles and not fate.reason and fate.cols % BLOCK]
        if partial:
            self.draft.warnings.append(
                f"{printable(partial[0][0])} and {len(partial) - 1} more: {partial[0][1]} input features are no multiple of 128;"
                " engines that quantize activations in groups of 128 refuse such a layer, and transformers reads its tiles wrongly"
            )
        if recipe.quant == "int8_dynamic":
            self.draft.warnings.append("TensorRT-LLM reads an INT8 directory as FP8, which is wrong; vLLM and SGLang read it right")

    def _side_files(self) -> None:
        ignore, quantization = list[str](), None
        if self.recipe is not None:
            kept = {name for name, fate in self.fates.items() if fate.reason}
            heads = tied_heads(self.stored, self.index.config)
            ignore = ignored({*kept, *heads}, self.fates.keys() - kept, self.recipe.container)
        asked = ignore, self.target.group_size, bool(self.cached)
        if self.recipe is not None:
            quantization = config_json.quantization_config(self.recipe, *asked)
        forms = {*self.stored.forms()}
        floats = {self._plain_dtype(form) for form in forms if form.dtype.name in FLOATS}
        changed = self.target.dtype != "auto" and self.recipe is None and floats == {self.into}
        config = config_json.output_config(self.index.config, quantization, self.into.torch if changed else None)
        copied, left_out = side_files(self.index)
        self.draft.warnings += left_out
        if self.recipe is not None:
            count = sum(not fate.reason for fate in self.fates.values())
            named = Counter(starred(name) for name in ignore if not name.startswith(("re:", "*")))
            done = Done(self.recipe.quant, self.recipe.container, self.target.arithmetic, count, named)
            copied = [file for file in copied if file.name != NAME] + [card(self.index, done, copied)]
        self.draft.side_files += copied
        config_json.add_index(self.draft)
        if self.recipe is not None and self.recipe.container == "modelopt":
            self.draft.side_file("hf_quant_config.json", config_json.hf_quant_config(self.recipe, *asked))
        self.draft.side_file("config.json", config)


def _within_tile(weight: Form) -> bool:
    return weight.rows <= BLOCK and weight.cols <= BLOCK
