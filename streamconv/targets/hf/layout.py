"""Which tensors lie in which file of the output, and how each is stored."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.codes_file import ApartTensor, Codes, Found
from streamconv.checkpoint.dtypes import F32, I64, DType
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import NoSource
from streamconv.errors import printable
from streamconv.planning.draft import Draft
from streamconv.planning.plan import SideFile
from streamconv.quants.awq import PairedCodes
from streamconv.quants.base import Encoding, Part
from streamconv.quants.fp8_tensor import Fp8Scale, WeightMaximum
from streamconv.quants.given_codes import Words
from streamconv.quants.plain import Plain
from streamconv.targets.hf import config_json
from streamconv.targets.hf.card import NAME, Done, card, left
from streamconv.targets.hf.found_codes import taken
from streamconv.targets.hf.input_scales import cache_maxima, input_maxima
from streamconv.targets.hf.recipes import BLOCK, Recipe, Request
from streamconv.targets.hf.rules import Module, classify, default_reason, grouped, matches, partners, split_groups
from streamconv.targets.hf.side_files import side_files
from streamconv.targets.hf.sources import Stored, Weight, stored_weights
from streamconv.targets.hf.stacked import unstack

if TYPE_CHECKING:
    from streamconv.targets.hf.target import HuggingFace

_APART = ("kv_b_proj", "k_b_proj", "eh_proj")
"""Modules that TensorRT-LLM never reads as FP8 tiles; the first two are also taken apart for attention."""
_FLOATS = ("F32", "F16", "BF16")
_METADATA = {"format": "pt"}
SHARD = 5 * 10**9
"""Bytes of a file where the source's files are cut in another way: what transformers takes."""
_ONE = {"F32": b"\0\0\x80\x3f", "F16": b"\0\x3c", "BF16": b"\x80\x3f"}


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that keeps its name, with this shape."""

    recorded: tuple[int, ...]

    def name(self, module: str, role: str) -> str:
        return module

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        return self.recorded


_plain, _whole = cache(Plain), cache(Whole)
"""A model of experts has some tens of thousands of weights, and few types and shapes."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """The tensors of a quantized weight, as a row of the formats table says."""

    recipe: Recipe

    def name(self, module: str, role: str) -> str:
        return f"{module}.{self.recipe.tensors[role]}"

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        own = self.recipe.shapes.get(part.role)
        return own(rows, cols) if own else part.shape


@dataclass(slots=True)
class Layout:
    """Describes one output to a Draft.

    Attributes:
        recipe: the row of the formats table; None re-saves.
        into: float type of weights that are decoded.
        ranges: what a calibration run measured, where something needs it.
        codes: what a search found, where --method has one.
        inputs: module -> largest input; cached: weight -> attention, k or v, largest output; searched: module -> its codes; changed: norm
            or bias -> what takes its place.
    """

    index: Index
    target: HuggingFace
    recipe: Recipe | None
    draft: Draft
    into: DType
    ranges: Ranges | None = None
    codes: Codes | None = None
    refused: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    inputs: dict[str, float] = field(default_factory=dict)
    cached: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    searched: dict[str, Found] = field(default_factory=dict)
    changed: dict[str, ApartTensor] = field(default_factory=dict)

    def describe(self) -> None:
        stored = stored_weights(self.index, self.into)
        if self.recipe is not None:
            unstack(stored, self.index.config)
        self.names = set(stored.weights)
        modules = self._modules(stored)
        wanted = {module.name: module for module in modules if not module.reason}
        self._check(modules, wanted)
        if self.refused:
            return
        if self.ranges is not None and self.recipe is not None:
            self.inputs = input_maxima(self.ranges, wanted) if self.recipe.input_scale is not None else {}
            self.cached = cache_maxima(self.ranges, stored.shapes) if self.target.kv_cache is not None else {}
        if self.codes is not None:
            assert self.recipe is not None
            self.searched, self.changed = taken(self.codes, self.index, stored, wanted, self.target.group_size, self.recipe)
        files = self._files(stored)
        places: dict[str, str] = {}
        for name, tensors in files.items():
            number = self.draft.file(name, _METADATA)
            for tensor in tensors:
                for made in self._tensor(number, tensor, stored, wanted):
                    places[made] = name
        self._say(modules, wanted, stored)
        self._side_files(modules, wanted, stored, places)

    # ---- what is quantized

    def _modules(self, stored: Stored) -> list[Module]:
        if self.recipe is None:
            return []
        shapes = {name: shape for name, shape in stored.shapes.items() if stored.weights[name].dtype.name in _FLOATS}
        modules = classify(shapes, self.target.ignore, self.target.only)
        odd = {m.name for m in modules if not m.reason and self._left(m)}
        odd |= {other for name in odd for other in partners(name)}
        why = "a size is no multiple of 128, alone or of a partner"
        return [dataclasses.replace(m, reason=why) if m.name in odd and not m.reason else m for m in modules]

    def _left(self, module: Module) -> bool:
        """Tiles that readers would cut otherwise: transformers takes their size from the grid, and activations come in groups of 128."""
        recipe = self.recipe
        assert recipe is not None
        if not recipe.tiles or matches(module.name, self.target.only):
            return False
        if recipe.container == "hf":
            return bool(module.rows % BLOCK or module.cols % BLOCK) or module.name.endswith(_APART)
        return recipe.container == "compressed-tensors" and self.target.arithmetic == "float32" and bool(module.cols % BLOCK)

    def _check(self, modules: list[Module], wanted: dict[str, Module]) -> None:
        recipe = self.recipe
        if recipe is None:
            return
        unit = recipe.unit or self.target.group_size
        bad = [m for m in wanted.values() if m.cols % unit or m.rows % recipe.whole]
        for key, count in grouped(bad).items():
            one = next(m for m in bad if grouped([m]) == {key: 1})
            more = f" (and {count - 1} like it)" if count > 1 else ""
            group = f"groups of {unit}" if recipe.unit != 1 else "pairs of rows"
            self.refused.append(
                f"{printable(one.name)}{more}: shape [{one.rows}, {one.cols}] does not divide into {group}: choose another --group-size,"
                f" or leave it and its partners with --ignore 're:.*\\.{one.name.rpartition('.')[2]}$'"
            )
        self.refused += split_groups(modules)
        if not wanted and not self.refused:
            self.refused.append("nothing is left to quantize: every weight is ignored")
        if self.target.only:
            for pattern in self.target.only:
                if not any(matches(m.name, [pattern]) for m in modules):
                    self.refused.append(f"--only {printable(pattern)} matches no linear layer")

    # ---- files

    def _files(self, stored: Stored) -> dict[str, list[str]]:
        """Output file -> names of the source's tensors that it takes, in order."""
        most = self.target.max_shard_size or (SHARD if self.index.views else None)
        sizes = {name: weight.nbytes if most is not None else 0 for name, weight in stored.weights.items()}
        return shards_of(self.index, stored.files, sizes, most)

    def _tensor(self, file: int, name: str, stored: Stored, wanted: dict[str, Module]) -> list[str]:
        """Add one weight of the source; gives the names of the tensors it becomes."""
        weight, module = stored.weights[name], name.removesuffix(".weight")
        scales = self._cache_scale(file, name)
        if self.recipe is None or module not in wanted or not name.endswith(".weight"):
            rows, plain = weight.rows, _plain(self._plain_dtype(weight, stored))
            matrix = self.draft.matrix(file, name, rows, weight.cols, plain, spelling=_whole(stored.shapes[name]))
            self.draft.feed(matrix, self.changed.get(name, weight), 0, rows)
            return [name, *scales]
        return self._quantized(file, module, weight, self.recipe, stored) + scales

    def _cache_scale(self, file: int, weight: str) -> list[str]:
        """Add the scale of the FP8 KV cache that stands beside k_proj or v_proj."""
        if weight not in self.cached or self.recipe is None:
            return []
        attention, which, largest = self.cached[weight]
        modelopt = self.recipe.container == "modelopt"
        name = f"{attention}.{which}_proj.{which}_scale" if modelopt else f"{attention}.{which}_scale"
        self.draft.constant(file, name, F32, () if modelopt else (1,), struct.pack("<f", largest / 448.0))
        return [name]

    def _plain_dtype(self, weight: Weight, stored: Stored) -> DType:
        cast = self.index.views or (self.target.dtype != "auto" and not stored.decoded)
        return self.into if cast and weight.dtype.name in _FLOATS else weight.dtype

    def _quantized(self, file: int, module: str, weight: Weight, recipe: Recipe, stored: Stored) -> list[str]:
        rows, cols = weight.rows, weight.cols
        lone = recipe.lone if _within_tile(weight) else None
        group = [name for name in partners(module) or (module,) if f"{name}.weight" in self.names]
        shares = recipe.shared is not None or (lone is not None and self._shares(group[0], stored))
        key = "amax of " + (group[0] if shares else module)
        request = Request(weight.dtype, self.target.group_size, self.target.arithmetic, key, self.target.method)
        searched = self.searched.get(module)
        if searched is not None:
            codec: Encoding = Words(4) if recipe.container == "compressed-tensors" else PairedCodes()
        else:
            codec = (lone[0] if lone else recipe.codec)(request)
        matrix = self.draft.matrix(file, module, rows, cols, codec, spelling=Spelled(recipe))
        made = self.draft.tensors(matrix)
        self.draft.feed(matrix, weight if searched is None else searched.codes, 0, rows)
        if searched is not None:
            made.append(f"{module}.{recipe.tensors['scale']}")
            kind = Plain(weight.dtype if recipe.container == "compressed-tensors" else F32)
            scale = self.draft.matrix(file, made[-1], rows, searched.scales.cols, kind, spelling=Whole(searched.scales.shape))
            self.draft.feed(scale, searched.scales, 0, rows)
        if codec.needs:
            self.draft.reduce(weight, WeightMaximum(key))
        if recipe.shared is not None:
            suffix, shared = recipe.shared
            self._scalar(file, f"{module}.{suffix}", shared(request), made)
        elif codec.needs:
            self._scalar(file, f"{module}.weight_scale", lone[1](request) if lone else Fp8Scale(key), made)
        if recipe.input_scale is not None:
            suffix, of, shape = recipe.input_scale
            self._constant(file, f"{module}.{suffix}", F32, shape, struct.pack("<f", of(self.inputs[module])), made)
        if recipe.weight_shape:
            self._constant(file, f"{module}.weight_shape", I64, (2,), struct.pack("<2q", rows, cols), made)
        if recipe.pre_scales and not partners(module):
            self._pre_scale(file, f"{module}.{recipe.pre_scales}", weight, searched, made)
        return made

    def _pre_scale(self, file: int, name: str, weight: Weight, searched: Found | None, made: list[str]) -> None:
        if searched is None or searched.multiplier is None:
            self._constant(file, name, weight.dtype, (weight.cols,), _ONE[weight.dtype.name] * weight.cols, made)
            return
        matrix = self.draft.matrix(file, name, weight.cols, 1, Plain(weight.dtype), spelling=Whole((weight.cols,)))
        self.draft.feed(matrix, searched.multiplier, 0, weight.cols)
        made.append(name)

    def _shares(self, first: str, stored: Stored) -> bool:
        """ModelOpt gives partners one scale if the first of them has only one; each expert's keep their own."""
        return ".experts." not in first and _within_tile(stored.weights[f"{first}.weight"])

    def _constant(self, file: int, name: str, dtype: DType, shape: tuple[int, ...], data: bytes, made: list[str]) -> None:
        self.draft.constant(file, name, dtype, shape, data)
        made.append(name)

    def _scalar(self, file: int, name: str, codec: Encoding, made: list[str]) -> None:
        shape = () if self.recipe is not None and self.recipe.container == "modelopt" else (1,)
        matrix = self.draft.matrix(file, name, 1, 1, codec, spelling=Whole(shape))
        self.draft.feed(matrix, NoSource(name), 0, 1)
        made.append(name)

    # ---- what is told

    def _say(self, modules: list[Module], wanted: dict[str, Module], stored: Stored) -> None:
        for (name, reason), count in grouped(modules).items():
            times = f" ({count})" if count > 1 else ""
            how = self.recipe.quant if self.recipe and not reason else reason
            self.draft.decisions.setdefault(name + times, how if not reason else f"left as it is: {reason}")
        if stored.decoded:
            self.draft.warnings.append(
                f"{len(stored.decoded)} weights of the source are quantized; they are decoded to {self.into.torch}"
                + (" and quantized anew" if self.recipe else "")
            )
        recipe = self.recipe
        if recipe is None:
            return
        stacked = [name for name, shape in stored.shapes.items() if len(shape) == 3 and ".experts." in name]
        if stacked:
            self.draft.warnings.append(
                f"{printable(stacked[0])} and {len(stacked) - 1} more hold all experts of a layer in a form that is not quantized here:"
                f" they stay {stored.weights[stacked[0]].dtype.torch}"
            )
        partial = [m for m in wanted.values() if recipe.tiles and (m.cols % BLOCK)]
        if partial:
            self.draft.warnings.append(
                f"{printable(partial[0].name)} and {len(partial) - 1} more: {partial[0].cols} input features are no multiple of 128;"
                " engines that quantize activations in groups of 128 refuse such a layer, and transformers reads its tiles wrongly"
            )
        if recipe.quant == "int8_dynamic":
            self.draft.warnings.append("TensorRT-LLM reads an INT8 directory as FP8, which is wrong; vLLM and SGLang read it right")

    def _side_files(self, modules: list[Module], wanted: dict[str, Module], stored: Stored, places: dict[str, str]) -> None:
        ignore = [m.name for m in modules if m.reason and default_reason(m.name) not in ("embedding", "not a linear layer")]
        if "lm_head" not in ignore and "lm_head" not in wanted:
            ignore.append("lm_head")
        ignore.sort(key=natural)
        told, quantization = (ignore, self.target.group_size, bool(self.cached)), None
        if self.recipe is not None:
            quantization = config_json.quantization_config(self.recipe, *told)
        floats = {self._plain_dtype(w, stored) for w in stored.weights.values() if w.dtype.name in _FLOATS}
        changed = self.target.dtype != "auto" and self.recipe is None and floats == {self.into}
        config = config_json.output_config(self.index.config, quantization, self.into.torch if changed else None)
        copied, left_out = side_files(self.index)
        self.draft.warnings += left_out
        if self.recipe is not None:
            done = Done(self.recipe.quant, self.recipe.container, self.target.arithmetic, len(wanted), left(ignore))
            copied = [file for file in copied if file.name != NAME] + [card(self.index, done, copied)]
        self.draft.side_files += copied
        if len(set(places.values())) > 1 or set(places.values()) != {"model.safetensors"}:
            self._add("model.safetensors.index.json", config_json.index_json(places, self.draft.tensor_bytes()))
        if self.recipe is not None and self.recipe.container == "modelopt":
            self._add("hf_quant_config.json", config_json.hf_quant_config(self.recipe, *told))
        self._add("config.json", config)

    def _add(self, name: str, data: bytes) -> None:
        self.draft.side_files.append(SideFile(name, len(data), data))


def _within_tile(weight: Weight) -> bool:
    return weight.rows <= BLOCK and weight.cols <= BLOCK


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def shards_of(index: Index, files: Mapping[str, int], sizes: Mapping[str, int], most: int | None) -> dict[str, list[str]]:
    """Output file -> the tensors that it takes, in order.

    Args:
        files: tensor -> number of the source's shard.
        sizes: tensor -> bytes.
        most: bytes of a file; None splits as the source does.
    """
    if most is None:
        names = output_names([shard.path.name for shard in index.shards])
        found: dict[str, list[str]] = {}
        for tensor in sizes:
            found.setdefault(names[files[tensor]], []).append(tensor)
        return dict(sorted(found.items()))
    shards: list[list[str]] = [[]]
    held = 0
    for tensor, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": part for n, part in enumerate(shards, 1)}


def output_names(names: list[str]) -> list[str]:
    """Names of the output's files for those of the source."""
    if len(names) == 1:
        return ["model.safetensors"]
    found = []
    for name in names:
        stem = name.rpartition(".")[0]
        found.append(("model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem) + ".safetensors")
    return found
