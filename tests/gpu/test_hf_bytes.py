"""Every format of the Hugging Face target, byte for byte as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv import api
from streamconv.options import Resources
from streamconv.targets.hf.recipes import RECIPES, Recipe
from streamconv.targets.hf.target import ARITHMETICS, HuggingFace
from tests.gpu.world import files, wide

WEIGHTS_ONLY = [recipe for recipe in RECIPES if recipe.input_scale is None]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("recipe", WEIGHTS_ONLY, ids=lambda recipe: f"{recipe.quant}-{recipe.container}")
def test_a_format(recipe: Recipe, arithmetic: str, tmp_path: Path) -> None:
    source = wide(tmp_path / "in", 512, 1024)
    target = HuggingFace(quant=recipe.quant, format=recipe.container, arithmetic=arithmetic)
    for device in ("cpu", "cuda"):
        api.convert(source, tmp_path / device, target, Resources(device=device))
    on_cpu, on_gpu = files(tmp_path / "cpu"), files(tmp_path / "cuda")
    assert on_gpu == on_cpu
