"""The search for INT4 codes as the work of a calibration: Grams of a layer's inputs, then the codes of its weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamconv.calibration.codes_writer import CodesWriter
from streamconv.calibration.folds import Fold, Folds
from streamconv.calibration.gram import Gram
from streamconv.calibration.grid import Grid
from streamconv.calibration.layers import Experts
from streamconv.calibration.search import Found, Site, nearest, search
from streamconv.calibration.tiers import LINEAR, SAMPLE, SITES, SMALLER, gram_bytes, losses_bytes, passes_of, search_bytes, tier_of
from streamconv.checkpoint.codes_file import Losses, mark_of
from streamconv.errors import DataError, UsageError, printable

if TYPE_CHECKING:
    from streamconv.calibration.layers import OneLayer
    from streamconv.calibration.names import Place
    from streamconv.calibration.scratch import Scratch
    from streamconv.checkpoint.model_config import ModelConfig


@dataclass
class _Site:
    """Attributes:
    first: the module whose input is watched.
    modules: names in the layer.
    size: channels of the input.
    fallback: a site whose Gram stands in if too few tokens came; "" if there is none.
    """

    first: str
    size: int
    modules: list[str] = field(default_factory=list)
    fallback: str = ""


class CodesWork:
    """Finds INT4 codes; see `work.Work`.

    Args:
        method: "clip", "awq" or "gptq".
        group: input channels that share a scale.
        scale: the type that scales are rounded to, "source" for that of the weight.
        room: bytes that the Grams of a pass may take together.
        fold: where AWQ's pre-scales go.
    """

    name = "INT4 codes"
    smaller = SMALLER
    captured = False

    def __init__(self, method: str, group: int, scale: str, room: int, device: str, fold: Fold = "") -> None:
        self.asked: Any = ["int4", method, group, scale, *([fold] if fold else [])]
        self._method, self._group, self._scale = method, group, scale
        self._room, self._device, self._fold = room, device, fold
        self._grams: dict[str, Gram] = {}
        self._short = 0

    # ---- what it takes

    def holds(self, path: Path) -> str | None:
        from streamconv.checkpoint.header import read_header

        return None if any(name.endswith(".weight_scale") for name in read_header(path).tensors) else self.name

    def extra(self, facts: ModelConfig) -> int:
        return search_bytes(self._method, self._group, facts, self._device)

    def kept(self, rows: int, cols: int) -> int:
        return losses_bytes(rows, cols)

    # ---- the layer

    def open(self, layer: OneLayer, scratch: Scratch, tokens: int, facts: dict[str, Any]) -> None:
        if tokens < self._group:
            raise UsageError(f"--text: {tokens} tokens are too few to search with", hint=f"at least {self._group}, better 65536")
        modules, multipliers, others = dict[str, tuple[int, int]](), set[str](), list[Any]()
        for number in range(layer.layers):
            places = layer.places_of(number)
            folds = self._folds_of(layer, places)
            for name, place in places.items():
                linear = layer.layer.get_submodule(name.rpartition(".")[0])
                if self._wanted(name, place, linear):
                    modules[place.module] = (linear.out_features, linear.in_features)
                    if self._method == "awq" and folds.stores(place.role):
                        multipliers.add(place.module)
            others += [place.record for place in folds.others().values()]
        if not modules:
            raise UsageError(f"--group-size {self._group}: no linear layer divides into such groups", hint="--group-size 64")
        self._tokens = tokens
        identity = facts | {"method": self._method, "weights": mark_of(layer.index, modules)}
        identity |= {"folded": self._fold} if self._fold else {}
        path = scratch.folder / "codes"
        self._writer = CodesWriter(path, modules, self._group, multipliers, others, identity, begun=scratch.done > 0)

    def _folds_of(self, layer: OneLayer, places: Mapping[str, Place]) -> Folds:
        heads = (layer.facts.num_key_value_heads, layer.facts.num_attention_heads // layer.facts.num_key_value_heads, layer.facts.head_size)
        return Folds(self._fold, places, heads, 1.0 if layer.family.norm_add_one else 0.0)

    def _wanted(self, parameter: str, place: Place, linear: Any) -> bool:
        fits = isinstance(linear, torch.nn.Linear) and not linear.in_features % self._group and not linear.out_features % 2
        return fits and parameter.endswith(".weight") and place.role in LINEAR

    def watch(self, layer: torch.nn.Module) -> None:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear | Experts):
                module.register_forward_pre_hook(functools.partial(self._add, name))

    def _add(self, name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if name in self._grams:
            self._grams[name].add(inputs[0])

    def passes(self, layer: OneLayer) -> Sequence[Callable[[], None]]:
        """Sites by passes; a fallback goes with the sites that it stands in for."""
        self._layer, self._losses, self._scales = layer, dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        self._folds = self._folds_of(layer, layer.places)
        sizes = ((site, gram_bytes(tier_of(self._method, site.size), site.size, self._group)) for site in self._sites(layer))
        groups = passes_of(sizes, self._room)
        return [functools.partial(self._begin, group) for group in groups] or [lambda: None]

    def _sites(self, layer: OneLayer) -> list[_Site]:
        sites: dict[str, _Site] = {}
        for name, place in layer.places.items():
            module = name.rpartition(".")[0]
            linear = layer.layer.get_submodule(module)
            if not self._wanted(name, place, linear):
                continue
            stem, _, _ = module.rpartition(".")
            key = f"{stem}.{SITES[place.role]}" if place.role in SITES else module
            site = sites.setdefault(key, _Site(module, linear.in_features))
            site.modules.append(module)
            if place.role in ("expert_gate", "expert_up"):
                site.fallback = stem.rpartition(".")[0]
        return list(sites.values())

    def _begin(self, group: list[_Site]) -> None:
        self._close()
        self._group_sites = group
        every = max(1, self._tokens // SAMPLE)
        for site in group:
            self._grams[site.first] = self._gram(site.size, every)
            if site.fallback and site.fallback not in self._grams:
                self._grams[site.fallback] = self._gram(site.size, every)

    def _gram(self, size: int, every: int) -> Gram:
        return Gram(tier_of(self._method, size), size, self._group, torch.device(self._layer.device), every)

    def _close(self) -> None:
        """The pass is over: the codes of its sites."""
        if not self._grams:
            return
        for gram in self._grams.values():
            gram.finish()
        for site in self._group_sites:
            self._quantize(site)
        self._grams.clear()

    def _quantize(self, site: _Site) -> None:
        places = {module: self._layer.places[f"{module}.weight"] for module in site.modules}
        weights, grids = {}, {}
        for module in site.modules:
            weight = self._layer.layer.get_submodule(module).weight.detach()
            grids[module] = grid = self._grid(places[module])
            weights[module] = weight.to(grid.dtype) if weight.dtype.itemsize > grid.dtype.itemsize else weight
            if not bool(weight.isfinite().all()):
                raise DataError(f"{printable(places[module].module)}: NaN or infinity in a weight that is to be quantized")
        gram = self._grams[site.first]
        if gram.tokens < 4 * self._group:
            gram = self._instead(site, gram)
        if not gram.finite():
            raise DataError(
                f"{printable(next(iter(places.values())).module)}: the inputs are NaN or infinite", hint="are the weights sound?"
            )
        if gram.tokens == 0:
            for module in site.modules:
                self._put(module, nearest(weights[module], grids[module]), None)
            return
        result = self._search(site, weights, gram, grids)
        self._short += result.unfactored
        for module, codes in result.found.items():
            self._put(module, codes, result.multiplier)

    def _search(self, site: _Site, weights: Mapping[str, torch.Tensor], gram: Gram, grids: Mapping[str, Grid]) -> Site:
        role = self._layer.places[f"{site.first}.weight"].role
        if self._method != "awq" or self._folds.stores(role):
            return search(self._method, weights, gram, grids)
        into = self._folds.of(role, site.first, site.size, self._layer.index)
        if into is None:
            return search("clip", weights, gram, grids)
        result = search("awq", weights, gram, grids, lambda scale: into.multiplier(scale.cpu()).to(scale))
        if result.multiplier is not None:
            self._folds.take(into, result.multiplier)
        return result

    def _grid(self, place: Place) -> Grid:
        return Grid(self._group, getattr(torch, place.record.dtype.torch if self._scale == "source" else self._scale))

    def _instead(self, site: _Site, gram: Gram) -> Gram:
        """What stands in for an expert that few tokens reached: what all tokens of the layer are, or the outputs of all experts."""
        if site.fallback:
            return max(gram, self._grams[site.fallback], key=lambda one: one.tokens)
        alike = [s for s in self._group_sites if s.size == site.size and self._layer.places[f"{s.first}.weight"].role == "expert_down"]
        return Gram.mean([self._grams[other.first] for other in alike]) if site in alike else gram

    def _put(self, name: str, codes: Found, multiplier: torch.Tensor | None) -> None:
        place = self._layer.places[f"{name}.weight"]
        self._writer.put_codes(f"{place.module}.weight", codes.codes)
        self._writer.put(f"{place.module}.weight_scale", codes.scales)
        if self._fold:
            self._scales[f"{name}.weight"] = codes.scales.cpu()
        if self._method == "awq" and self._folds.stores(place.role):
            size = codes.codes.shape[1]
            self._writer.put(f"{place.module}.pre_quant_scale", torch.ones(size) if multiplier is None else multiplier)
        self._losses[f"{place.module}.losses"] = codes.losses

    def finish(self, layer: OneLayer) -> dict[str, torch.Tensor]:
        self._close()
        for name, factors in self._folds.rows().items():
            self._multiply(name, factors)
        for name, place in self._folds.others().items():
            self._writer.put(place.record.name, self._folds.values(name, layer.index))
        self._writer.sync()
        return self._losses

    def _multiply(self, name: str, factors: torch.Tensor) -> None:
        """The last rows of a weight by a factor each: their codes stay, and their scales take it."""
        place, scales = self._layer.places[name], self._scales[name]
        scales[-len(factors) :] *= factors[:, None]
        self._writer.put(f"{place.module}.weight_scale", self._grid(place).rounded(scales))

    # ---- the file

    def write(self, results: dict[str, torch.Tensor], new: Path, facts: dict[str, Any]) -> int:
        for name, values in results.items():
            self._writer.put(name, values)
        self._writer.close()
        os.replace(self._writer.path, new)
        return len(results)

    def notes(self, results: dict[str, torch.Tensor]) -> list[str]:
        pairs = {name: (float(v[1] / v[0]), float(v[2] / v[0])) for name, v in results.items() if v[0] > 0}
        lines = [Losses(self._method, pairs).line()]
        unseen = len(results) - len(pairs)
        if unseen:
            lines.append(f"warning: no token reached {unseen} linear layers: they are rounded to nearest")
        if self._short:
            lines.append(f"warning: {self._short} inputs depend on each other too much for GPTQ: their weights have clipped scales")
        most = max((place.record.shape[-1] for place in self._layer.places.values()), default=0)
        if self._method == "gptq" and self._tokens < 2 * most:
            lines.append(f"warning: {self._tokens} tokens are fewer than twice the {most} inputs of a layer: more text makes better codes")
        return lines
