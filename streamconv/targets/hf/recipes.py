"""The formats of this target: quantization and container -> codec, tensor names, what the config says. One row each.

What a format does not use of the options is told too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.options import METHODS as INT4_METHODS
from streamconv.quants.awq_words import LEAST, AwqWords
from streamconv.quants.base import Codec, Part
from streamconv.quants.fp8_block import Fp8Block
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.fp8_tensor import Fp8Scale, Fp8Tensor
from streamconv.quants.int_group import IntGroup
from streamconv.quants.mx import Mx
from streamconv.quants.nvfp4 import NvFp4, SharedScale
from streamconv.quants.packing import Packing
from streamconv.quants.rounding import LEAST_NORMAL
from streamconv.targets.base import flag
from streamconv.targets.hf.target import ARITHMETICS, KEEP, Container

BLOCK = 128

_EPS = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""What compressed-tensors puts in the place of a scale of 0: the type's epsilon."""


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """What a codec is made from.

    Attributes:
        dtype: the weight's, that of the checkpoint.
        key: of the shared maximum of a weight and its partners.
        method: --method, None for the container's own rule.
    """

    dtype: DType
    group: int
    arithmetic: str
    key: str
    method: str | None = None

    @property
    def scale(self) -> DType:
        """The type that scales are rounded to."""
        return F32 if self.arithmetic == "float32" else self.dtype

    @property
    def quotient(self) -> DType:
        """The type that weight / scale is rounded to."""
        return self.dtype if self.arithmetic == "llm-compressor-cpu" else F32


Shape = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """One format, and how it spells the tensors of a weight.

    Attributes:
        quant, container: what the user asks for.
        codec: the codec of a weight [N, K].
        tensors: role of a part -> last name of its tensor.
        shapes: role -> the recorded shape of a weight [rows, cols], where it is not the codec's own.
        unit: K must be a multiple of it; 0 for the group size.
        whole: N must be a multiple of it.
        tiles: both sizes should be multiples of 128.
        lone: the codec of a weight within one tile, and that of its scale, a tensor of shape []; None if it is stored as others are.
        shared: how the scale that partners share is stored: its last name, its codec.
        weights, inputs: the args of compressed-tensors' `config_groups`.
        form: compressed-tensors' `format`.
        algo: ModelOpt's `quant_algo`.
        extra: further keys of ModelOpt's config.
        stated: what config.json says in the containers hf and awq, and `leaves`: the key of the list of what is left as it is.
        weight_shape: the shape is a tensor of its own.
        pre_scales: last name of a vector [K] of ones, beside weights without partners: what the input is multiplied by.
        summary: one line for people.
        methods: values of --method.
        turned: codecs see a weight by its input channels.
        ranges: activation ranges are needed; the input's scale is stored under this name.
    """

    quant: str
    container: Container
    summary: str
    codec: Callable[[CodecOptions], Codec]
    tensors: dict[str, str]
    shapes: dict[str, Shape] = field(default_factory=dict)
    unit: int = 1
    whole: int = 1
    tiles: bool = False
    lone: tuple[Callable[[CodecOptions], Codec], Callable[[CodecOptions], Codec]] | None = None
    shared: tuple[str, Callable[[CodecOptions], Codec]] | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    form: str = ""
    algo: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    leaves: str = "modules_to_not_convert"
    weight_shape: bool = False
    pre_scales: str = ""
    input_scale: tuple[str, Callable[[float], float], tuple[int, ...]] | None = None
    grouped: bool = False
    methods: tuple[str, ...] = ()
    turned: bool = False

    def ending(self, role: str) -> str:
        return f".{self.tensors[role]}"

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        own = self.shapes.get(part.role)
        return own(rows, cols) if own else part.shape


_INF = math.inf
_PLAIN = {"weight": "weight", "per_channel_scale": "weight_scale"}
_CODES = {"codes": "weight", "scale": "weight_scale"}
_PACKED = {"codes": "weight_packed", "scale": "weight_scale"}


def _column(rows: int, cols: int) -> tuple[int, ...]:
    return (rows, 1)


def _vector(rows: int, cols: int) -> tuple[int, ...]:
    return (rows,)


def _tiles4(rows: int, cols: int) -> tuple[int, ...]:
    return (-(-rows // BLOCK), 1, -(-cols // BLOCK), 1)


def _fp8_channel(r: CodecOptions) -> Codec:
    return Fp8Rowwise(-_INF, _INF, None, 0.0, _EPS[r.scale.name], r.scale, r.quotient)


def _fp8_channel_modelopt(r: CodecOptions) -> Codec:
    return Fp8Rowwise(-_INF, _INF, None, LEAST_NORMAL[r.dtype.name] / 448.0, 1.0)


def _fp8_tiles(r: CodecOptions) -> Codec:
    return Fp8Block(BLOCK, _EPS[r.scale.name], 0.0, r.scale, r.quotient)


def _int(bits: int, packing: Packing, stored_kind: bool, whole_channel: bool = False) -> Callable[[CodecOptions], Codec]:
    def codec(r: CodecOptions) -> Codec:
        if r.method is not None:
            return _searched(r, packing)
        scale = r.dtype if stored_kind else r.scale
        divisor = (2**bits - 1) / 2
        return IntGroup(bits, 0 if whole_channel else r.group, divisor, _EPS[scale.name], scale, r.quotient, packing)

    return codec


def _int_modelopt(bits: int, packing: Packing) -> Callable[[CodecOptions], Codec]:
    def codec(r: CodecOptions) -> Codec:
        if r.method is not None:
            return _searched(r, packing)
        largest = float(2 ** (bits - 1) - 1)
        least = LEAST_NORMAL[r.dtype.name if bits == 8 else "F32"]
        return IntGroup(bits, 0 if bits == 8 else r.group, largest, 1.0, F32, F32, packing, least / largest)

    return codec


def _searched(r: CodecOptions, packing: Packing) -> Codec:
    """--method rtn divides a group's maximum by 8, for which there is a code; the search ends at that of 7, for which both ends have one.

    Scales are rounded to the weight's type in either container: engines cast them to it.
    """
    search = r.method == "mse"
    floor = LEAST_NORMAL["F16"] if r.dtype.name == "F16" else 0.0
    return IntGroup(4, r.group, 7.0 if search else 8.0, 1.0, r.dtype, F32, packing, floor, packing == "pairs" and r.dtype != F32, search)


def _words_awq(r: CodecOptions) -> Codec:
    """Asymmetric where nothing is asked for, as AutoAWQ; a --method has the scales of the other containers, and zero points of 8."""
    search, kind = r.method == "mse", F16 if r.dtype == F32 else r.dtype
    if r.method is None:
        return AwqWords(r.group, kind)
    return AwqWords(r.group, kind, IntGroup(4, r.group, 7.0 if search else 8.0, 1.0, kind, F32, "words", LEAST, search=search))


def _mx(element: Literal["fp4", "fp8"]) -> Callable[[CodecOptions], Codec]:
    return lambda r: Mx(element, "rounded", r.scale)


def _args(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, "strategy": strategy, **more}


_float, _integer = partial(_args, "float"), partial(_args, "int")
_DYNAMIC_TOKEN = {"dynamic": True, "strategy": "token"}
NVFP4_ARGS = _float(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_MX_IN = {**_MX, "dynamic": True}

RECIPES: tuple[Recipe, ...] = (
    Recipe("fp8_dynamic", "compressed-tensors", "FP8 weights per channel, activations per token at run time", _fp8_channel,
           _PLAIN, {"per_channel_scale": _column}, form="float-quantized",
           weights=_float(8, "channel"), inputs=_float(8, "token") | _DYNAMIC_TOKEN),
    Recipe("fp8_dynamic", "modelopt", "the same numbers for TensorRT-LLM first", _fp8_channel_modelopt,
           _PLAIN, {"per_channel_scale": _vector}, algo="FP8_PER_CHANNEL_PER_TOKEN"),
    Recipe("fp8_block", "hf", "FP8 weights in tiles of 128 x 128; hf: DeepSeek's container",
           lambda r: Fp8Block(BLOCK, multiply=True), {"codes": "weight", "scale": "weight_scale_inv"}, tiles=True,
           stated={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}),
    Recipe("fp8_block", "compressed-tensors", "FP8 weights in tiles of 128 x 128", _fp8_tiles, _CODES, tiles=True,
           form="float-quantized", weights=_float(8, "block", block_structure=[BLOCK, BLOCK]),
           inputs=_float(8, "group", group_size=BLOCK) | {"dynamic": True}),
    Recipe("fp8_block", "modelopt", "FP8 weights in tiles of 128 x 128",
           lambda r: Fp8Block(BLOCK, 1.0, LEAST_NORMAL[r.dtype.name] / 448.0), _CODES | {"weight": "weight"}, {"scale": _tiles4},
           tiles=True, lone=(lambda r: Fp8Tensor(r.key, LEAST_NORMAL[r.dtype.name] / 448.0),
                             lambda r: Fp8Scale(r.key, LEAST_NORMAL[r.dtype.name] / 448.0)), algo="fp8_pb_wo"),
    Recipe("int8_dynamic", "compressed-tensors", "INT8 weights per channel, activations per token at run time",
           _int(8, "bytes", False, True), _CODES, {"scale": _column}, form="int-quantized",
           weights=_integer(8, "channel"), inputs=_integer(8, "token") | _DYNAMIC_TOKEN),
    Recipe("w4a16", "compressed-tensors", "INT4 weights in groups", _int(4, "words", True), _PACKED, unit=0,
           form="pack-quantized", weights=_integer(4, "group"), weight_shape=True, grouped=True,
           methods=INT4_METHODS),
    Recipe("w4a16", "modelopt", "INT4 weights in groups, pre-scales of 1 (TensorRT-LLM's W4A16_AWQ)", _int_modelopt(4, "pairs"),
           _CODES, unit=0, whole=2, algo="W4A16_AWQ", extra={"has_zero_point": False, "pre_quant_scale": True}, grouped=True,
           pre_scales="pre_quant_scale", methods=INT4_METHODS),
    Recipe("w4a16", "awq", "INT4 weights in groups, asymmetric without --method: AutoAWQ's GEMM layout", _words_awq,
           {"codes": "qweight", "zero": "qzeros", "scale": "scales"}, unit=0, whole=8, grouped=True, methods=INT4_METHODS, turned=True,
           stated={"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}),
    Recipe("w8a16", "compressed-tensors", "INT8 weights in groups", _int(8, "words", True), _PACKED, unit=0,
           form="pack-quantized", weights=_integer(8, "group"), weight_shape=True, grouped=True),
    Recipe("w8a16", "modelopt", "INT8 weights per channel", _int_modelopt(8, "bytes"), _CODES, {"scale": _vector}, algo="W8A16"),
    Recipe("nvfp4a16", "compressed-tensors", "NVFP4 weights", lambda r: NvFp4(r.key, "divisor", r.scale), _PACKED, unit=16,
           form="nvfp4-pack-quantized", weights=NVFP4_ARGS,
           shared=("weight_global_scale", lambda r: SharedScale(r.key, "divisor", r.scale))),
    Recipe("nvfp4a16", "modelopt", "NVFP4 weights", lambda r: NvFp4(r.key, "multiplier"), _CODES, unit=16, algo="W4A16_NVFP4",
           shared=("weight_scale_2", lambda r: SharedScale(r.key, "multiplier")), extra={"group_size": 16}),
    Recipe("nvfp4", "compressed-tensors", "NVFP4 weights and activations; needs activation ranges",
           lambda r: NvFp4(r.key, "divisor", r.scale), _PACKED, unit=16, form="nvfp4-pack-quantized",
           weights=NVFP4_ARGS, inputs=NVFP4_ARGS | {"dynamic": "local"},
           shared=("weight_global_scale", lambda r: SharedScale(r.key, "divisor", r.scale)),
           input_scale=("input_global_scale", lambda amax: 2688.0 / amax, (1,))),
    Recipe("nvfp4", "modelopt", "NVFP4 weights and activations; needs activation ranges",
           lambda r: NvFp4(r.key, "multiplier"), _CODES, unit=16, algo="NVFP4",
           shared=("weight_scale_2", lambda r: SharedScale(r.key, "multiplier")), extra={"group_size": 16},
           input_scale=("input_scale", lambda amax: amax / 2688.0, ())),
    Recipe("mxfp4", "compressed-tensors", "MXFP4 weights and activations", _mx("fp4"), _PACKED, unit=32,
           form="mxfp4-pack-quantized", weights=_float(4, "group", **_MX), inputs=_float(4, "group", **_MX_IN)),
    Recipe("mxfp4a16", "compressed-tensors", "MXFP4 weights", _mx("fp4"), _PACKED, unit=32,
           form="mxfp4-pack-quantized", weights=_float(4, "group", **_MX)),
    Recipe("mxfp8", "compressed-tensors", "MXFP8 weights and activations", _mx("fp8"), _CODES, unit=32,
           form="mxfp8-quantized", weights=_float(8, "group", **_MX), inputs=_float(8, "group", **_MX_IN)),
    Recipe("mxfp8", "modelopt", "MXFP8 weights and activations", lambda r: Mx("fp8", "ceiling"), _CODES, unit=32,
           algo="MXFP8", extra={"group_size": 32}),
    Recipe("mxfp8", "hf", "MXFP8 weights and activations, for SGLang and TensorRT-LLM", lambda r: Mx("fp8", "ceiling"),
           {"codes": "weight", "scale": "weight_scale_inv"}, unit=32, leaves="ignored_layers",
           stated={"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}),
    Recipe("mxfp8a16", "compressed-tensors", "MXFP8 weights", _mx("fp8"), _CODES, unit=32,
           form="mxfp8-quantized", weights=_float(8, "group", **_MX)),
    Recipe("fp8_static", "modelopt", "FP8 weights and activations, one scale each; needs activation ranges",
           lambda r: Fp8Tensor(r.key), {"weight": "weight"}, algo="FP8",
           input_scale=("input_scale", lambda amax: amax / 448.0, ())),
    Recipe("fp8_static", "compressed-tensors", "FP8 weights and activations, one scale each; needs activation ranges",
           lambda r: Fp8Tensor(r.key), {"weight": "weight"}, form="float-quantized",
           weights=_float(8, "tensor"), inputs=_float(8, "tensor"), input_scale=("input_scale", lambda amax: amax / 448.0, (1,))),
)  # fmt: skip
"""In the order of a quantization's containers: the first is its default."""

METHODS = tuple(row.stated["quant_method"] for row in RECIPES if row.container == "hf")
"""Values of `quant_method` that mean the container hf."""

QUANTS = tuple(dict.fromkeys(recipe.quant for recipe in RECIPES))
"""Values of --quant."""


def recipe_of(quant: str, container: str | None) -> Recipe | None:
    """The row for a quantization in a container, in its default one if None."""
    return next((r for r in RECIPES if r.quant == quant and container in (None, r.container)), None)



def without_effect(quant: str, recipe: Recipe | None, given: Collection[str]) -> Iterator[str]:
    """A line for each of the options `given` that the format does not use.

    Args:
        recipe: the format of --quant; None: nothing is quantized here.
    """
    if recipe is None:
        names = ("group_size", "arithmetic", "method", *(() if quant == KEEP else ("ignore", "only")))  # which keep refuses by itself
        yield from (f"{flag(name)} has no effect with --quant {quant}" for name in names if name in given)
        return
    users: dict[str, Callable[[Recipe], bool]] = {
        "group_size": lambda row: row.grouped,
        "arithmetic": _rounds_otherwise,
        "method": lambda row: bool(row.methods),
    }
    for name, uses in users.items():
        if name in given and not uses(recipe):
            containers = [row.container for row in RECIPES if uses(row) and row.quant == recipe.quant]
            if containers:
                yield f"{flag(name)} has no effect with --format {recipe.container}, it is for {', '.join(containers)}"
            else:
                quants = dict.fromkeys(row.quant for row in RECIPES if uses(row))
                yield f"{flag(name)} has no effect with --quant {recipe.quant}, it is for {', '.join(quants)}"


def _rounds_otherwise(recipe: Recipe) -> bool:
    """Whether --arithmetic decides bytes of a format: whether its codecs differ (of a bfloat16 model; a float32 one rounds nothing)."""
    request = CodecOptions(dtype=BF16, group=128, arithmetic=ARITHMETICS[0], key="")
    codecs = [recipe.codec, *([recipe.shared[1]] if recipe.shared else [])]
    return any(codec(request) != codec(replace(request, arithmetic=other)) for codec in codecs for other in ARITHMETICS[1:])
