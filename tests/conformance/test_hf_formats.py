"""Every row of the Hugging Face target's formats table, by itself: who adds a row is held to all of this."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.quants.base import Encoding, Findings
from streamconv.targets.hf.check_scales import tensors_wanted
from streamconv.targets.hf.config_json import quantization_config
from streamconv.targets.hf.recipes import BLOCK, RECIPES, Recipe, Request, recipe_of
from streamconv.targets.hf.stated import stated_recipe
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


def codecs(recipe: Recipe, source: DType, block: torch.Tensor) -> list[Encoding]:
    """The row's codecs in every arithmetic, that of a weight within one tile too, with what they need known."""
    made = []
    for arithmetic in ARITHMETICS:
        request = Request(source, GROUP, arithmetic, "amax")
        both = [recipe.codec(request), *([recipe.lone[0](request)] if recipe.lone else [])]
        made += [codec.bind(Largest(block), "weight") for codec in both]
    return made


@pytest.mark.parametrize("source", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("recipe", ROWS)
def test_bytes_values_and_sizes(recipe: Recipe, source: DType) -> None:
    block = weights(160, 192, source)
    block = torch.where(block.float().abs() > 1e30, 0.0, block)  # the bounds are those of rows that overflow nothing
    for codec in codecs(recipe, source, block):
        check(codec, block, source)
        encoded = [part.clone() for part in codec.encode(block, Findings())]
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
    stated = quantization_config(recipe, ["lm_head"], group) | ({"group_size": group} if recipe.container == "modelopt" else {})
    found = stated_recipe(stated)
    assert found is not None
    row = found[0]
    assert (row.tensors, row.container) == (recipe.tensors, recipe.container)
    assert row is recipe
    codec = recipe.codec(Request(BF16, group, "float32", "amax"))
    code = codec.parts(256, 384)[0]
    wanted = tensors_wanted("m.o_proj", recipe, group, (code.dtype.name, code.shape))
    assert wanted is not None and (code.dtype.name, code.shape) in wanted[recipe.tensors[code.role]]


def test_each_quantization_has_a_default_and_one_row_for_each_container() -> None:
    assert len({(recipe.quant, recipe.container) for recipe in RECIPES}) == len(RECIPES)
    assert all(recipe_of(recipe.quant, None) and recipe_of(recipe.quant, recipe.container) is recipe for recipe in RECIPES)
