"""Every family and every quant that is listed, each with each: who adds one adds a recipe, and everything here holds for it.

Names, shapes and dtypes against config.json; every source byte used once; values within the error that the format states and
where they belong; the same bytes for small tiles; the ranks' slices joined against the single rank.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from streamconv import api
from streamconv.errors import RefusedError, TensorError
from streamconv.families import all_families
from streamconv.options import Resources
from streamconv.planning.plan import Plan
from streamconv.run import manifest
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants
from streamconv.verification.check import verify
from tests.conformance import layout
from tests.conformance.output import Decoded, bytes_read, check_places, decode, elements_used
from tests.conformance.recipes import LAYERS, RECIPES, Recipe, names, values, write
from tests.conformance.sources import RUNS, Run, Source, make

FAMILIES = {family.name: family for family in all_families()}
GROUPED = ("int4_gptq", "int8_gptq", "int4_awq")
EVERY_RUN = ("llama", "mixtral")
"""Families that show a quant in all its forms; what a form changes is the same for every family."""
ATTENTION = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|wqkv)\.y$")
UNSMOOTHED = ("gemma", "gemma2", "internlm2", "llama-meta", "mixtral", "phi3", "qwen3", "qwen3_moe")
"""Families that SmoothQuant is refused for; what is spelled like Llama takes it."""



def _quick(recipe: Recipe, quant: str, number: int) -> bool:
    """Every format on two families, all its forms on one, every family in two formats; `make test-all` runs each with each."""
    if recipe.variant:
        return quant == "none"
    return (quant in ("none", "int8") and not number) or (recipe.family in EVERY_RUN and (not number or recipe.family == "llama"))


def _quick_in_tiles(recipe: Recipe, quant: str, number: int) -> bool:
    """Every layout and every format once: how rows are cut is decided by the family, what a tile holds by the format."""
    return not number and (quant == "none" or (recipe.family == "llama" and not recipe.variant))


CASES = [
    pytest.param(
        *(recipe, quant, run, tiles),
        id=f"{recipe}-{quant}-{run.name}{'-tiles' * tiles}",
        marks=() if _quick(recipe, quant, number) and tiles == _quick_in_tiles(recipe, quant, number) else pytest.mark.slow,
    )
    for recipe in RECIPES
    for quant in all_quants()
    if recipe.quants is None or quant in recipe.quants
    for number, run in enumerate(RUNS.get(quant, ()))
    if not number or run.everywhere or (recipe.family in EVERY_RUN and not recipe.variant)
    if recipe.family in FAMILIES and run.options.get("target_version", "1.2") in FAMILIES[recipe.family].versions
    for tiles in (False, True)
    if tiles or not _quick_in_tiles(recipe, quant, number)
]
"""(recipe, quant, run, whether tiles are small too, and what is written is held against the source's bytes)"""


def refused(recipe: Recipe, quant: str, run: Run) -> str | None:
    """What a refusal says of a family and a quant that do not go together; None if they do."""
    if quant in ("int4_gptq", "int8_gptq") and recipe.family == "llama-meta":
        return "is not quantized"
    if quant == "smoothquant" and recipe.family in UNSMOOTHED:
        return "is not supported"
    if quant == "smoothquant" and recipe.config.get("mlp_bias"):
        return "mlp_bias"
    if quant in (*GROUPED, "fp8", "fp8_rowwise") and recipe.experts:
        return "experts|mixture-of-experts"
    return None


def cut_refused(recipe: Recipe, quant: str, options: TensorRTLLM) -> str | None:
    """The same for a split."""
    if options.pp_size > 1 and recipe.family in ("phi3", "gemma", "gemma2"):
        return "pipeline parallelism is not supported"
    heads = quant in GROUPED or quant == "smoothquant" or (quant == "fp8_rowwise" and not options.use_meta_fp8_rowwise_recipe)
    if options.tp_size > recipe.kv and heads:
        return f"num_key_value_heads {recipe.kv}"
    return None


def test_every_family_has_a_recipe() -> None:
    told = {recipe.family for recipe in RECIPES}
    missing = sorted(set(FAMILIES) - told)
    assert not missing, f"families without a tiny model: {', '.join(missing)}; add a Recipe for each to tests/conformance/recipes.py"
    assert not told - set(FAMILIES), f"recipes of families that are not listed: {', '.join(sorted(told - set(FAMILIES)))}"


def test_every_quant_is_exercised() -> None:
    used = {quant for quant, runs in RUNS.items() for run in runs for recipe in RECIPES if refused(recipe, quant, run) is None}
    missing = sorted(set(all_quants()) - used)
    assert not missing, f"quants that no family is converted with: {', '.join(missing)}; add a Run for each to tests/conformance/sources.py"
    assert not set(RUNS) - set(all_quants()), "runs of quants that are not listed"


def test_every_role_is_in_a_recipe() -> None:
    for family in FAMILIES.values():
        used = {key[0] for recipe in RECIPES if recipe.family == family.name for key in names(recipe, family)}
        # biases that a family may have but no model of it does are those of Llama's table
        optional = {role for role in family.tensors if role.endswith("_bias")} if family.name != "llama" else set()
        missing = sorted(set(family.tensors) - used - optional)
        assert not missing, f"{family.name}: no recipe has {', '.join(missing)}"


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.variant], ids=str)
def test_no_tensor_is_left_out_silently(recipe: Recipe, tmp_path: Path) -> None:
    family = FAMILIES[recipe.family]
    name = names(recipe, family)["o", 1, -1].removesuffix("weight") + "surprise"
    held = {names(recipe, family)[key]: value for key, value in values(recipe, family).items()}
    write(recipe, family, tmp_path / "in", held | {name: torch.zeros(2, 2)})
    with pytest.raises(TensorError, match=f"unexpected tensor {name}"):
        api.open_and_plan(tmp_path / "in", TensorRTLLM())


@pytest.mark.parametrize(("recipe", "quant", "run", "tiles"), CASES)
def test_family_with_quant(recipe: Recipe, quant: str, run: Run, tiles: bool, tmp_path: Path) -> None:
    family = FAMILIES[recipe.family]
    source = make(recipe, family, run, tmp_path / "in")
    says = refused(recipe, quant, run)
    if says is not None:
        with pytest.raises((RefusedError, TensorError), match=says):
            api.open_and_plan(source.folder, source.options(quant, run))
        return
    one = source.options(quant, run)
    single = _convert(source, one, tmp_path / "single")
    assert not [name for name in single[0].got if single[0].got[name].isnan().any()]
    _against_reference(source, one, single[0])
    if not family.pipeline:
        says = cut_refused(recipe, quant, stages := source.options(quant, run, pp_size=2))
        with pytest.raises(RefusedError, match=says):
            api.open_and_plan(source.folder, stages)
    old = run.options.get("target_version") == "0.16"  # which cannot cut three layers in two
    grids = [{"tp_size": 2, "pp_size": 1 if old or not family.pipeline else 2}]
    grids += [{"tp_size": 4}] if quant == "none" and recipe.kv < 4 else []  # ranks share KV heads
    grids += [{"tp_size": 2, "moe_ep_size": 2, "moe_tp_size": 1}] if recipe.experts else []
    grids += [{"tp_size": 4, "moe_ep_size": 2, "moe_tp_size": 2}] if recipe.experts and quant == "none" else []
    for number, grid in enumerate(grids):
        options = source.options(quant, run, **grid)
        says = cut_refused(recipe, quant, options)
        if says is not None:
            with pytest.raises(RefusedError, match=says):
                api.open_and_plan(source.folder, options)
            continue
        # where experts go has no say in how rows are cut
        ranks = _convert(source, options, tmp_path / f"cut{number}", tiles=tiles and options.tp_size == 2 and options.moe_ep_size <= 1)
        _against_single(source, options, single[0], ranks)


def _convert(source: Source, options: TensorRTLLM, out: Path, tiles: bool = False) -> list[Decoded]:
    """Convert, with small tiles too if asked; check everything that one output says; gives its values."""
    index, plan = api.open_and_plan(source.folder, options)
    with index:
        check_places(plan)
        api.convert(source.folder, out, options, Resources(workers=1))
        tensors = sum(file.tensors for file in plan.files)
        if tiles:
            _small_tiles(source, plan, out)  # and every byte of it, against the source
            verdict = verify(out, source.folder, resources=Resources(workers=2, tile_rows=13))
            assert (verdict.problems, verdict.warnings, verdict.encoded) == ([], [], tensors)
        (out / manifest.NAME).unlink()  # only config.json says what must be there
        verdict = verify(out, source.folder if tiles else None, activation_ranges=options.activation_ranges)
        assert not verdict.problems and len(verdict.warnings) == 1, (verdict.problems, verdict.warnings)
        assert verdict.encoded == (tensors if tiles else 0)
        assert json.loads((out / "config.json").read_text())["mapping"]["world_size"] == len(plan.files)
        _every_byte_once(source, plan, index)
        return decode(plan, index, out)


def _small_tiles(source: Source, plan: Plan, out: Path) -> None:
    small = out.with_name("tiles")
    rows = 23 if source.recipe.experts else 7  # odd, and few enough tiles for a quick test
    report = api.convert(source.folder, small, plan.target, Resources(workers=2, tile_rows=rows), force=True)
    assert report.tiles > len(plan.spans)
    for file in (*(file.name for file in plan.files), "config.json"):
        assert (out / file).read_bytes() == (small / file).read_bytes(), f"{file} depends on the size of the tiles"


def _every_byte_once(source: Source, plan: Plan, index: api.Index) -> None:
    counts, passes = bytes_read(plan, index)
    assert all(times == 1 for times in passes.values()), f"read twice for the same maxima: {passes.most_common(1)}"
    total = 0
    for name, record in index.tensors.items():
        places = [(record.shard, record.begin, record.nbytes)]
        if index.assembled:
            places = [(b.shard, b.begin, b.rows * b.cols * record.dtype.itemsize) for b in index.assembled[name].pieces]
        seen = np.concatenate([counts[shard][begin : begin + size] for shard, begin, size in places])
        times = int(name not in source.unread)
        assert (seen == times).all(), f"{name}: bytes are read {seen.min()} to {seen.max()} times, not {times}"
        total += seen.size * times
    assert sum(int(count.sum()) for count in counts) == total, "bytes are read that belong to no tensor"
    used, options = elements_used(plan), plan.target
    named = names(source.recipe, source.family)
    once = bool(getattr(all_quants()[options.quant], "row_bias_once", False))
    for (role, _, _), name in named.items():
        found = used.get(name, used.get(name.removesuffix("weight") + "qweight"))
        split = options.use_parallel_embedding and options.tp_size > 1
        wanted = layout.uses(source.recipe, role, options.tp_size, split_embedding=split, once=once)
        if layout.shared(source.recipe, options) and role == "embedding":
            wanted -= 1
        if not wanted:
            assert found is None, f"{name} is stored, though the embedding takes its place"
            continue
        assert found is not None, f"{name} is used nowhere"
        if role in ("qkv", "qkv_grouped"):
            shared = layout.uses(source.recipe, "k", options.tp_size, split_embedding=split, once=once)
            wanted = np.array([[shared if copied else wanted] for copied in layout.copied_rows(source.recipe, role)])
        assert (found == wanted).all(), f"{name}: elements are stored {found.min()} to {found.max()} times, not {wanted}"


def _against_reference(source: Source, options: TensorRTLLM, made: Decoded) -> None:
    """One rank against the modules put together here; names in `made` that nobody knows are an error too."""
    recipe = source.recipe
    wanted = {f"{module}.weight": array.float() for module, array in layout.modules(recipe, source.held).items()}
    wanted |= {f"{module}.bias": array.float() for module, array in layout.modules(recipe, source.held, "_bias").items()}
    for module, array in layout.plain(recipe, source.held).items():
        norm = recipe.family in layout.ADD_ONE and array.dim() == 1
        wanted[f"{module}.weight"] = array.float() + 1.0 if norm else array.float()
    scale = "per_channel_scale" if any(t.dtype == torch.float8_e4m3fn for t in source.held.values()) else "weights_scaling_factor"
    wanted |= {f"{module}.{scale}": array.float() for module, array in layout.modules(recipe, source.scales).items()}
    for module, array in layout.inputs(source.inputs).items():
        wanted[f"{module}.prequant_scaling_factor"] = array.float()
    for name, got in made.got.items():
        if name in made.derived:
            continue
        assert name in wanted, f"{name} was written, and no role asks for it"
        want = wanted.pop(name).reshape(got.shape)
        slack = made.error[name] + (want.abs() * 2.0**-10 if options.quant == "smoothquant" else 0.0)
        worst = float(((got - want).abs() - slack).max())
        assert worst <= 0, f"{name}: not the values that belong there, off by {worst:g} more than the format's error"
    if layout.shared(recipe, options):
        wanted.pop("lm_head.weight")
    left = [name for name in wanted if name not in made.derived]
    assert not left, f"{left[0]} is not in the checkpoint"


def _against_single(source: Source, options: TensorRTLLM, single: Decoded, ranks: list[Decoded]) -> None:
    """Slices of every tensor, put together, are the tensor of one rank: bit for bit unless a slice has a scale of its own."""
    recipe, seen, first = source.recipe, set(), 0
    split = options.embedding_sharding_dim if options.use_parallel_embedding else None
    split = 0 if source.family.config_class == "gemma" else split
    for stage in range(options.pp_size):
        held = ranks[stage * options.tp_size : (stage + 1) * options.tp_size]
        layers = {int(name.split(".")[2]) for name in held[0].got if ".layers." in name}
        for name in held[0].got:
            if name not in single.got and name == "lm_head.weight":  # shared on one rank, here it is the embedding, cut
                whole_head = layout.join(recipe, name, [rank.got[name] for rank in held], moe_ep=1, split_embedding=None)
                assert torch.equal(whole_head, single.got["transformer.vocab_embedding.weight"])
                seen.add(name)
                continue
            local = name.split(".")
            if ".layers." in name:
                local[2] = str(int(local[2]) + first)
            whole = ".".join(local)
            parts = [rank.got[name] for rank in held]
            if name.endswith(("dense.bias", "proj.bias")) and options.quant in GROUPED[:2]:
                assert not any(part.any() for part in parts[1:]), f"{name}: added on every rank"
                parts = [parts[0]] * len(parts)
            joined = layout.join(recipe, name, parts, moe_ep=max(1, options.moe_ep_size), split_embedding=split)
            own = name in held[0].quantized and whole.split(".", 3)[-1].removesuffix(".weight") in layout.ROW_PARALLEL
            if own and options.quant in ("int8", "int4", "fp8_rowwise"):
                bounds = [rank.error[name] for rank in held]
                bound = layout.join(recipe, name, bounds, moe_ep=max(1, options.moe_ep_size), split_embedding=split)
                assert ((joined - single.got[whole]).abs() <= bound + single.error[whole]).all(), f"{whole}: slices hold other values"
            else:
                assert torch.equal(joined, single.got[whole]), f"{whole}: the joined slices of {len(held)} ranks are not the whole"
            seen.add(whole)
        first += len(layers)
    alone = {"lm_head.weight"} if layout.shared(recipe, TensorRTLLM(target_version=options.target_version)) else set()
    assert seen - alone == set(single.got) and first == LAYERS


@pytest.mark.parametrize("family", ["llama", "phi3", "internlm2"])
def test_int8_kv_factor(family: str, tmp_path: Path) -> None:
    """max(y_q, y_k, y_v) / 127 in float32, where the three are one tensor too; the same on every rank."""
    recipe = next(recipe for recipe in RECIPES if recipe.family == family and not recipe.variant)
    run = next(run for run in RUNS["none"] if run.options.get("kv_cache") == "int8")
    source = make(recipe, FAMILIES[family], run, tmp_path / "in")
    options = source.options("none", run, tp_size=2)
    api.convert(source.folder, tmp_path / "out", options, Resources(workers=1))
    assert options.activation_ranges is not None
    ranges = load_file(options.activation_ranges)
    for layer in range(LAYERS):
        held = [top.max() for name, top in ranges.items() if name.endswith(".y") and f".{layer}." in name and ATTENTION.search(name)]
        assert len(held) == (3 if family == "llama" else 1)
        want = torch.stack(held).max().float() / 127
        for rank in range(2):
            got = load_file(tmp_path / "out" / f"rank{rank}.safetensors")[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert got.dtype == torch.float32 and got.tolist() == [want.item()]
