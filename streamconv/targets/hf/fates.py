"""What becomes of each weight of a linear layer: quantized, or left as it is and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from streamconv.errors import printable
from streamconv.targets.hf.ignored import is_head, is_table
from streamconv.targets.hf.recipes import BLOCK, Recipe
from streamconv.targets.hf.rules import EMBEDDING, NOT_LINEAR, Module, classify, matches, partners, split_groups, starred
from streamconv.targets.hf.stored import Stored

if TYPE_CHECKING:
    from streamconv.targets.hf.target import HuggingFace

_APART = ("kv_b_proj", "k_b_proj", "eh_proj")
"""Modules that TensorRT-LLM never reads as FP8 tiles; the first two are also taken apart for attention."""


class Fates:
    """The fate of every module with a 2-D weight of floats.

    Args:
        tied: readers put the embedding in the place of a stored lm_head.

    Attributes:
        by_name: name -> the first module of its kind, in the order of the source.
        refused: what engines would refuse, one line each.
    """

    def __init__(self, stored: Stored, target: HuggingFace, recipe: Recipe, vocab: int | None = None, tied: bool = False) -> None:
        self._target, self._recipe, self._vocab, self._tied = target, recipe, vocab, tied
        forms = zip(stored.order, stored.forms(), strict=True)
        self.by_name: dict[str, Module] = {name[:-7]: _NONE for name, form in forms if form.linear and name.endswith(".weight")}
        some, turned = list[Module](), list[str]()
        for kind in stored.kinds():
            shapes = {rest[:-7]: form.shape for rest, form in kind.held.items() if form.linear and rest.endswith(".weight")}
            for heads in self._alike(kind.heads, shapes) if shapes else ():
                modules = self._modules({f"{heads[0]}{rest}.weight": shape for rest, shape in shapes.items()})
                some += modules
                turned += [module.name for module in modules if _is_turned(stored, module)]
                for rest, module in zip(shapes, modules, strict=True):
                    self.by_name.update(dict.fromkeys([head + rest for head in heads], module))
        if turned:
            self.refused = [_TURNED.format(printable(turned[0]))]
            return
        self.refused = self._check(some) and self._check([dataclasses.replace(m, name=name) for name, m in self.by_name.items()])

    def wanted(self) -> dict[str, Module]:
        """The modules that are quantized."""
        return {name: fate for name, fate in self.by_name.items() if not fate.reason}

    def grouped(self) -> dict[tuple[str, str], int]:
        """(name with layer and expert numbers as *, reason) -> how many, in order: what `plan` shows."""
        counts: Counter[tuple[str, str]] = Counter()
        for module, count in Counter(self.by_name.values()).items():
            counts[starred(module.name), module.reason] += count
        return counts

    def _alike(self, heads: list[str], rests: Collection[str]) -> Iterable[list[str]]:
        """The units of a kind by what the flags say of their modules."""
        patterns = (self._target.ignore, self._target.only)
        if not any(patterns):
            return [heads]
        groups: dict[tuple[bool, ...], list[str]] = {}
        for head in heads:
            names = [head + rest for rest in rests]
            groups.setdefault(tuple(matches(name, pattern) for name in names for pattern in patterns), []).append(head)
        return groups.values()

    def _modules(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Module]:
        modules = classify(shapes, self._target.ignore, self._target.only)
        if self._tied:
            modules = [dataclasses.replace(m, reason=EMBEDDING) if not m.reason and is_head(m.name) else m for m in modules]
        table = "embedding or output projection: a row for each token"
        named = self._target.only
        modules = [
            dataclasses.replace(m, reason=table)
            if not m.reason and is_table(m.name, m.rows, self._vocab) and not matches(m.name, named)
            else m
            for m in modules
        ]
        odd = {m.name for m in modules if not m.reason and self._left(m)}
        odd |= {other for name in odd for other in partners(name)}
        why = "a size is no multiple of 128, alone or of a partner"
        return [dataclasses.replace(m, reason=why) if m.name in odd and not m.reason else m for m in modules]

    def _left(self, module: Module) -> bool:
        """Tiles that readers would cut otherwise: transformers takes their size from the grid, and activations come in groups of 128."""
        recipe, target = self._recipe, self._target
        if not recipe.tiles or matches(module.name, target.only):
            return False
        if recipe.container == "hf":
            return bool(module.rows % BLOCK or module.cols % BLOCK) or module.name.endswith(_APART)
        return recipe.container == "compressed-tensors" and target.arithmetic == "float32" and bool(module.cols % BLOCK)

    def _check(self, modules: Sequence[Module]) -> list[str]:
        recipe, target, refused = self._recipe, self._target, list[str]()
        chosen = [module for module in modules if not module.reason]
        unit = recipe.unit or target.group_size
        bad: dict[str, list[Module]] = {}
        for module in chosen:
            if module.cols % unit or module.rows % recipe.whole:
                bad.setdefault(starred(module.name), []).append(module)
        sizes = () if recipe.unit else (64, 32)  # of a fixed unit there is no other one
        fit = next((n for n in sizes if not any(m.cols % n or m.rows % recipe.whole for m in chain(*bad.values()))), None)
        other = f"use --group-size {fit}, or leave" if fit else "leave"
        for one, *others in bad.values():
            more = f" (and {len(others)} like it)" if others else ""
            group = f"groups of {unit}" if one.cols % unit else f"{recipe.whole} output channels at a time"
            refused.append(
                f"{printable(one.name)}{more}: shape [{one.rows}, {one.cols}] does not divide into {group}:"
                f" {other} it and its partners with --ignore 're:.*\\.{one.name.rpartition('.')[2]}$'"
            )
        refused += split_groups(modules)
        if not chosen and not refused:
            refused.append("nothing is left to quantize: every weight is ignored")
        for pattern in target.only:
            if not any(m.reason not in NOT_LINEAR and matches(m.name, [pattern]) for m in modules):
                refused.append(f"--only {printable(pattern)} matches no linear layer")
        return refused


_NONE = Module("", 0, 0)
_TURNED = (
    "{}: its weight stands as [in, out] (its bias has a number for each column: Conv1D, as in GPT-2), and readers quantize nn.Linear alone:"
    " they would take its codes for floats"
)


def _is_turned(stored: Stored, module: Module) -> bool:
    """Transformers' Conv1D; that of as many outputs as inputs does not tell, but it is not the only one of a model."""
    if module.reason or f"{module.name}.bias" not in stored.order:
        return False
    bias = stored.form(f"{module.name}.bias").shape
    return bias == (module.cols,) != (module.rows,)

