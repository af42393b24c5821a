"""Every row of the Hugging Face target's formats table, by itself: who adds a row is held to all of this."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.quants.base import Codec, EncodeStats, Part
from streamconv.targets.hf.config_json import quantization_config
from streamconv.targets.hf.recipes import BLOCK, RECIPES, CodecOptions, Recipe, recipe_of
from streamconv.targets.hf.stated import read_statement
from streamconv.targets.hf.target import ARITHMETICS
from tests.unit.test_kernels import check, weights

GROUP = 64
ROWS = [pytest.param(recipe, id=f"{recipe.quant}-{recipe.container}") for recipe in RECIPES]


class Largest:
    """A finished reduction: the largest weight of a block."""

    def __init__(self, block: torch.Tensor) -> None:
        self.top = block.float().abs().max().numpy()

    def get(self, key: str) -> Any:
        return self.top


def codecs(recipe: Recipe, source: DType, block: torch.Tensor) -> list[Codec]:
    """The row's codecs in every arithmetic, that of a weight within one tile too, with what they need known."""
    made = []
    for arithmetic in ARITHMETICS:
        request = CodecOptions(source, GROUP, arithmetic, "amax")
        both = [recipe.codec(request), *([recipe.lone[0](request)] if recipe.lone else [])]
        made += [codec.bind(Largest(block), "weight") for codec in both]
    return made


@pytest.mark.parametrize("source", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("recipe", ROWS)
def test_bytes_values_and_sizes(recipe: Recipe, source: DType) -> None:
    block = weights(192, 192, source)
    block = torch.where(block.float().abs() > 1e30, 0.0, block)  # the bounds are those of rows that overflow nothing
    for codec in codecs(recipe, source, block):
        check(codec, block, source)
        encoded = [part.clone() for part in codec.encode(block, EncodeStats())]
        gap = (codec.decode(encoded, *block.shape) - codec.values(block)).abs()
        assert bool((gap <= codec.error(block)).all()), codec
        for part, data in zip(codec.parts(*block.shape), encoded, strict=True):
            own = recipe.shapes.get(part.role)
            shape = own(*block.shape) if own and part.role in recipe.tensors else part.shape
            assert part.nbytes(block.shape[0]) == data.numel() == math.prod(shape) * part.dtype.itemsize, part
            assert part.role in recipe.tensors


@pytest.mark.parametrize("recipe", ROWS)
def test_what_its_config_says_is_found_again(recipe: Recipe) -> None:
    """By `verify`: the same tensors are wanted as are written."""
    group = GROUP if recipe.grouped else BLOCK
    stated = quantization_config(recipe, ["lm_head"], group)
    stated |= {"group_size": group} if recipe.grouped and recipe.container == "modelopt" else {}
    found = read_statement(stated)
    assert found.problems == [] == found.warnings and found.ignore.match("lm_head")
    scheme = found.groups[0].scheme
    assert scheme is not None
    parts = recipe.codec(CodecOptions(BF16, group, "float32", "amax")).parts(256, 384)
    told = {f"m.o_proj.{recipe.tensors[part.role]}": (part.dtype.name, _recorded(recipe, part)) for part in parts}
    told |= {"m.o_proj.weight_shape": ("I64", (2,))} if recipe.weight_shape else {}
    wanted = scheme.expected("m.o_proj", told)
    assert wanted is not None
    for name, (dtype, shape) in told.items():
        assert (dtype, shape) in wanted.pop(name.rpartition(".")[2])
    lone = {recipe.shared[0] if recipe.shared else "", recipe.pre_scales, recipe.input_scale[0] if recipe.input_scale else ""}
    assert wanted.keys() <= lone | {"weight_scale"}


def _recorded(recipe: Recipe, part: Part) -> tuple[int, ...]:
    own = recipe.shapes.get(part.role)
    return own(256, 384) if own else part.shape


def test_each_quantization_has_a_default_and_one_row_for_each_container() -> None:
    assert len({(recipe.quant, recipe.container) for recipe in RECIPES}) == len(RECIPES)
    assert all(recipe_of(recipe.quant, None) and recipe_of(recipe.quant, recipe.container) is recipe for recipe in RECIPES)
