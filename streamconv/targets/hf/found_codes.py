"""What a search on text found for the weights of a directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.checkpoint.codes_file import HINT, ApartTensor, Codes, Found
from streamconv.checkpoint.derived_rows import WIDE, turned
from streamconv.checkpoint.dtypes import F16, F32
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import RowSource, SourceTensor
from streamconv.errors import TensorError, UsageError, printable
from streamconv.families.naming import settle
from streamconv.natural import natural
from streamconv.quants.awq_words import AwqScales
from streamconv.quants.base import Codec
from streamconv.quants.given_codes import GivenIntegers
from streamconv.quants.plain import Plain
from streamconv.targets.hf.recipes import Recipe
from streamconv.targets.hf.rules import Module, partners
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stored import Form, Stored


def taken(
    codes: Codes, index: Index, stored: Stored, wanted: Mapping[str, Module], group: int, recipe: Recipe
) -> tuple[dict[str, Found], dict[str, ApartTensor]]:
    """(module -> its codes, norm or bias -> what takes its place); a search knows them by the names of the family tables.

    Args:
        wanted: linear modules that are quantized.

    Raises:
        UsageError: the codes are for another group size, container or choice of modules. TensorError: they are not those of the model.
    """
    named = settle(index)
    codes.check_model(named)
    known = {(r.shard, r.begin): name for name, r in named.tensors.items()}
    settled = {name: known.get((w.pieces[0].shard, w.pieces[0].begin), name) for name, w in stored.weights.items() if w.pieces}
    modules = {name: name if codes.has(name) else settled[f"{name}.weight"].removesuffix(".weight") for name in wanted}
    _check_folds(codes, set(modules.values()), recipe)
    found = {}
    for name, module in wanted.items():
        found[name] = codes.found(modules[name], (module.rows, module.cols), stored.weights[f"{name}.weight"].name)
        if found[name].group != group:
            told = f"--group-size {group}: the codes of {printable(name)} have groups of {found[name].group}"
            raise UsageError(told, hint=f"--group-size {found[name].group}")
        multiplier = found[name].multiplier
        if multiplier is not None and (not recipe.pre_scales or partners(name)):
            told = f"{printable(multiplier.name)} is in the codes, and a directory of {recipe.container} has no place for it"
            raise TensorError(f"{printable(str(codes.path))}: {told}", hint=HINT)
    changed = codes.changed()
    others = {name: changed[own] for name, own in settled.items() if own in changed}
    for name, tensor in others.items():
        if len(tensor.shape) > 1:
            raise TensorError(f"{printable(str(codes.path))}: {printable(name)} is neither a norm nor a bias", hint=HINT)
        if (tensor.shape, tensor.dtype) != (stored.form(name).shape, stored.form(name).dtype):
            raise TensorError(f"{printable(str(codes.path))}: {printable(name)} is not of the model's shape and type", hint=HINT)
    return found, others


def _check_folds(codes: Codes, quantized: Collection[str], recipe: Recipe) -> None:
    """The pre-scales are where this container's readers look for them, and whatever has inputs that a fold changes has the codes for it."""
    if codes.method == "awq" and codes.folded not in (("all", "norms") if recipe.pre_scales else ("all",)):
        told = f"--codes: the pre-scales of these are not folded as a directory of {recipe.container} needs it"
        raise UsageError(told, hint="--text FILE finds others")
    left = min((name for name in codes.modules() if codes.folded and name not in quantized), key=natural, default=None)
    if left is not None:
        told = f"--method awq: {printable(left)} is to stay as it is, and its pre-scale is in the layer before it"
        raise UsageError(told, hint="leave out --ignore and --only, or take --method gptq")


def tensors_of(weight: Weight, form: Form, codec: Codec, recipe: Recipe, found: Found | None) -> list[tuple[str, Codec, RowSource]]:
    """(role, codec, rows) of each tensor of a weight [N, K] whose codes were found, or whose container has a row for each input channel.

    Args:
        codec: of the weight's rows, or of its columns in such a container.

    Raises:
        UsageError: the source holds it in a form that is not read by columns.
    """
    if found is None:
        if not (isinstance(weight, SourceTensor) and weight.as_stored and len(weight.pieces) == 1):
            told = f"{printable(weight.name.removesuffix('.weight'))}: --format awq takes weights that are floats in a tensor of their own"
            raise UsageError(told, hint="--format compressed-tensors, or --quant none first")
        return [("", codec, turned(weight, WIDE))]
    if recipe.turned:
        return [("", GivenIntegers("awq"), found.codes.turned()), ("", AwqScales(), replace(found.scales, into=F16).turned())]
    packed = recipe.container == "compressed-tensors"
    kind = form.dtype if packed else F32
    scales = replace(found.scales, into=kind)
    return [("", GivenIntegers("words" if packed else "pairs"), found.codes), ("scale", Plain(kind), scales)]
