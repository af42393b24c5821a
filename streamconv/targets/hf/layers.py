"""A model held against itself and its config.json: the layers against each other, and every size against what the config says.

Known model types must be what their config says; what other types mean by a number is not known here, so differences are told and
refuse nothing. Layers of any type must hold what their like hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streamconv.errors import printable
from streamconv.natural import natural
from streamconv.targets.hf.model_types import (
    MODEL_TYPES,
    Fixed,
    ModelType,
    Sizes,
    beside_layers,
    in_layers,
    model_type,
    required,
    text_config,
)
from streamconv.targets.hf.rules import is_other_part
from streamconv.targets.hf.units import Entry, Kind, Shape, weights

_STACK = re.compile(r"^(.*?\b(?:layers?|h|blocks?))\.(\d{1,9})\.(.+)$")
_EXPERT = re.compile(r"\bexperts\.\d+(?=\.)")
_FREE = re.compile(r"rotary|relative|position|inv_freq|indexer|lora|adapter|shared_transformer")
"""What some layers have and others of the same kind do not."""
_CORE = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention|mlp|ffn|feed_forward|block_sparse_moe)$|^norms$")
_MLP_PART = re.compile(r"(.*)\b(?:gate|up|gate_up|down)_proj(?:\.weight)?")
_KV = re.compile(r"\.(k_proj|v_proj|k_norm|v_norm)\.")
_SHARING = re.compile(r"shar|cla_|yoco|reuse")
"""Keys of configs whose layers use the keys and values of others."""
_SHOWN = 20


class Model:
    """The weights of a model, by stack and layer.

    Args:
        bits: of integers in words, as the config says.
    """

    def __init__(self, config: Mapping[str, Any], units: Iterable[Kind[Entry]], bits: int | None) -> None:
        self.text = text_config(config)
        self.type = model_type(self.text)
        self.kind: ModelType | None = MODEL_TYPES.get(self.type)
        self.sizes = Sizes(self.text)
        self.layers: dict[str, dict[int, set[str]]] = {}
        self.experts: dict[tuple[str, int, str], dict[int, set[str]]] = {}
        self.beside: set[str] = set()
        self.odd: list[str] = []
        self.halves: list[str] = []
        self._halves: dict[str, Shape] = {}
        fixed, beside = in_layers(self.sizes, self.kind or ModelType()), beside_layers(self.sizes)
        for kind in units:
            self._take(kind, bits, fixed, beside)
        self.stem = self._language()

    def _take(self, kind: Kind[Entry], bits: int | None, fixed: Fixed, beside: Fixed) -> None:
        first = kind.heads[0]
        parts = [(name[len(first) :], shape) for name, shape in weights(kind.one(), bits)]
        starred: dict[str, frozenset[str]] = {}  # one for all layers
        alike: dict[str, dict[int, set[str]]] = {}  # name of all experts of a layer -> what each holds
        right = len(self.odd) + len(self.halves)
        for head in kind.heads:
            look = head is first or len(self.odd) + len(self.halves) > right
            outer = head[: head.rfind(".", 0, -1)]
            if outer in alike and not look:
                alike[outer].setdefault(int(head[len(outer) + 1 : -1][:9]), set()).update(name for name, _ in parts)
                continue
            match = _STACK.match(f"{head}*")
            if match is None:
                self.beside.update(head + name for name, _ in parts)
                for name, shape in parts if look else ():
                    if not is_other_part(head + name):
                        self._compare(head + name, name.rpartition(".")[0].rpartition(".")[2], shape, beside)
                continue
            stem, number, rest = match[1], int(match[2]), match[3][:-1]
            own = _EXPERT.sub("experts.*", rest)
            if own not in starred:
                starred[own] = frozenset(own + name for name, _ in parts)
            self.layers.setdefault(stem, {}).setdefault(number, set()).update(starred[own])
            if at := re.search(r"\bexperts\.(\d+)\.", rest):
                experts = self.experts.setdefault((stem, number, rest[: at.start()] + "experts"), {})
                experts.setdefault(int(at[1][:9]), set()).update(rest[at.end() :] + name for name, _ in parts)
                if at.end() == len(rest):
                    alike[outer] = experts
            for name, shape in parts if look else ():
                self._pair(head + name, shape)
                if not is_other_part(stem):
                    full = own + name
                    self._compare(head + name, full if full in fixed else full.rpartition(".")[0], shape, fixed)

    def _pair(self, name: str, shape: Shape | None) -> None:
        """The two halves of a gated MLP are of one shape."""
        module, _, last = name.removesuffix(".weight").rpartition(".")
        if shape is None or not name.endswith(("gate_proj.weight", "up_proj.weight")):
            return
        other = self._halves.pop(module, None)
        if other is None:
            self._halves[module] = shape
        elif other != shape:
            gate, up = (shape, other) if last == "gate_proj" else (other, shape)
            self.halves.append(f"{printable(module)}: gate_proj is {list(gate)} and up_proj {list(up)}")

    def _compare(self, name: str, module: str, shape: Shape | None, fixed: Fixed) -> None:
        if shape is None or module not in fixed:
            return
        means, why = fixed[module]
        if name.endswith(".bias"):
            means = means[:1]
        if shape != means and not name.endswith("_bias") and (self.kind is not None or len(shape) < 3) and len(self.odd) < _SHOWN:
            self.odd.append(f"{printable(name)} has shape {list(shape)}, expected {list(means)} from config.json ({why})")

    def _language(self) -> str | None:
        """The stack of the language model: named so, or the longest of those that belong to no other part."""
        own = [stem for stem in self.layers if not is_other_part(stem)] or list(self.layers)
        named = [stem for stem in own if stem.endswith(("model.layers", "decoder.layers"))]
        return max(named or own, key=lambda stem: len(self.layers[stem]), default=None)

    @property
    def fragment(self) -> bool:
        """A known type of which most of what every layer must have is nowhere: somebody cut it out, no download is like that."""
        if self.kind is None or self.stem is None:
            return False
        there = set[str]().union(*self.layers[self.stem].values())
        roles = list(required(self.text, self.kind))
        return 2 * sum(any(f"{module}.weight" in there for module in choices) for choices in roles) < len(roles)

    @property
    def count(self) -> int | None:
        """Layers that the config tells of."""
        count = self.text.get("num_hidden_layers")
        return count if type(count) is int and 0 <= count <= 100_000 else None


def differences(model: Model) -> tuple[list[str], list[str]]:
    """(what is wrong, what may be): missing layers, modules and experts, sizes that are not those of the config."""
    certain = [*_layers(model), *_alike(model), *_experts(model), *_gated(model), *_required(model), *_head(model), *model.halves]
    sizes = [*model.sizes.problems, *model.odd]
    if model.kind is not None and not model.fragment:
        return certain + sizes, []
    known = printable(model.type) if model.type else "not named in config.json"
    why = "these are parts of a model" if model.fragment else f"the model type is {known}, which is not known here"
    return certain, [f"{line}; {why}" for line in sizes[:3]]


def _layers(model: Model) -> Iterator[str]:
    """A stack of layers that is as long as the config says; which one it is differs from model to model."""
    if "num_hidden_layers" not in model.text or model.stem is None:
        return
    count = model.count
    if count is None:
        yield f"config.json: num_hidden_layers is {printable(str(model.text['num_hidden_layers'])[:40])}, no number of layers"
        return
    own = {stem: numbers for stem, numbers in model.layers.items() if not is_other_part(stem)} or model.layers
    if any(len(numbers) >= count and numbers.keys() >= set(range(count)) for numbers in own.values()):
        ahead = model.text.get("num_nextn_predict_layers")  # layers after the last one, which predict further tokens
        last = count + (ahead if type(ahead) is int and ahead > 0 else 0)
        more = sorted(number for number in model.layers[model.stem] if number >= last)
        if more and model.kind is not None and not model.fragment:
            yield f"{printable(model.stem)}.{more[0]} is there, config.json tells of {count} layers"
        return
    missing = sorted({*range(count)} - model.layers[model.stem].keys())
    yield from (f"{printable(model.stem)}.{number} is missing, config.json tells of {count}" for number in missing[:_SHOWN])


def _groups(stems: set[str]) -> dict[str, frozenset[str]]:
    """Module of a layer -> what it holds; the norms beside the modules are one."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name in stems:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or _FREE.search(name):
            continue
        parent = module.rpartition(".")[0]
        if parent or "norm" in module:
            groups[parent or "norms"].add(name)
    return {module: frozenset(names) for module, names in groups.items()}


def _tops(kind: Iterable[tuple[str, frozenset[str]]]) -> set[str]:
    """The children of a layer."""
    return {module.partition(".")[0] for module, _ in kind}


def _alike(model: Model) -> Iterator[str]:
    """Layers that lack something of what others of their kind have."""
    if "block_configs" in model.text or model.fragment:  # layers with parts left out on purpose
        return
    sharing = model.kind is None or any(_SHARING.search(key) for key in model.text)
    for stem, by_number in model.layers.items():
        last = model.count if stem == model.stem and model.count else max(by_number) + 1
        kinds: dict[frozenset[tuple[str, frozenset[str]]], list[int]] = {}
        for number in sorted(number for number in by_number if number < last):
            kinds.setdefault(frozenset(_groups(by_number[number]).items()), []).append(number)
        kinds_of: dict[str, set[frozenset[str]]] = defaultdict(set)
        modules = [frozenset(module for module, _ in kind if _CORE.search(module)) for kind in kinds]
        for kind in kinds:
            for module, names in kind:
                kinds_of[module].add(names)
        for (kind, numbers), own in zip(kinds.items(), modules, strict=True):
            at = f"{printable(stem)}.{numbers[0]}"
            more = f" (and {len(numbers) - 1} layers like it)" if len(numbers) > 1 else ""
            for module, names in kind:
                larger = min((other for other in kinds_of[module] if names < other), key=len, default=names)
                lacking = sorted(larger - names)
                if lacking and not (sharing and all(_KV.search(f".{name}") for name in lacking) and len(lacking) > 1):
                    yield f"{at}.{printable(lacking[0])} is missing{more}, other layers have it"
            whole = min((other for other in modules if own < other), key=len, default=own)
            theirs = {top for other, core in zip(kinds, modules, strict=True) if core == whole for top in _tops(other)}
            if not _tops(kind) <= theirs:  # hybrid models: linear attention, Mamba or a convolution in the place of attention
                continue
            yield from (f"{at}.{printable(module)} is missing{more}, other layers have it" for module in sorted(whole - own))


def _experts(model: Model) -> Iterator[str]:
    """Experts of a layer are numbered without gaps, as many as the config says, and alike; a router is not alone."""
    count = model.sizes.experts()
    for stem, numbers in model.layers.items():
        for number, names in numbers.items():
            for router in [name for name in names if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))]:
                module = router.removesuffix("gate.weight") + "experts"
                if not any(name.startswith(module) for name in names):
                    yield f"{printable(stem)}.{number}.{printable(module)} is missing"
    for (stem, number, module), numbers in model.experts.items():
        at = f"{printable(stem)}.{number}.{printable(module)}"
        count_expected = max(max(numbers) + 1, count or 0) if max(numbers) < 100_000 else len(numbers)
        missing = sorted({*range(count_expected)} - numbers.keys())
        if missing:
            yield f"{at}.{missing[0]} is missing"
        if count is not None and max(numbers) >= count and "block_configs" not in model.text:
            yield f"{at}.{max(numbers)} is there, config.json tells of {count} experts"
        whole = set[str]().union(*numbers.values())
        for expert, names in numbers.items():
            yield from (f"{at}.{expert}.{printable(name)} is missing" for name in sorted(whole - names)[:1])


def _gated(model: Model) -> Iterator[str]:
    """The parts of an MLP: no two layers need to be compared to say so."""
    known = model.kind is not None and not model.fragment
    for stem, numbers in model.layers.items() if not model.fragment else ():
        for number, names in numbers.items():
            modules = {match[1]: match[0] for name in names if (match := _MLP_PART.fullmatch(name))}
            for module in modules:
                fused = not {f"{module}gate_up_proj.weight", f"{module}gate_up_proj"}.isdisjoint(names)
                gated = f"{module}gate_proj.weight" in names or (known and stem == model.stem)
                parts = ("down_proj",) if fused else ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
                for part in parts:
                    if f"{module}{part}.weight" not in names and f"{module}{part}" not in names:
                        yield f"{printable(stem)}.{number}.{printable(module)}{part} is missing"


def _required(model: Model) -> Iterator[str]:
    if model.kind is None or model.stem is None or model.fragment:
        return
    roles = list(required(model.text, model.kind))
    for number, names in model.layers[model.stem].items():
        if not any(name.startswith(("mlp.", "block_sparse_moe.")) for name in names):
            yield f"{printable(model.stem)}.{number}.mlp is missing"
        for choices in roles:
            if not any(f"{module}.weight" in names for module in choices):
                yield f"{printable(model.stem)}.{number}.{choices[0]} is missing"
        if model.kind.qkv_bias and "self_attn.q_proj.weight" in names:
            for part in ("q_proj", "k_proj", "v_proj"):
                if f"self_attn.{part}.bias" not in names:
                    yield f"{printable(model.stem)}.{number}.self_attn.{part}.bias is missing"
        if model.text.get("attention_bias") is True and not any(n.startswith("self_attn.") and n.endswith("bias") for n in names):
            yield f"{printable(model.stem)}.{number}.self_attn has no bias, and config.json's attention_bias is true"
    prefix = model.stem.removesuffix("layers")
    for name in ("embed_tokens", "norm"):
        if f"{prefix}{name}.weight" not in model.beside:
            yield f"{printable(prefix)}{name}.weight is missing"


def _head(model: Model) -> Iterator[str]:
    names = model.text.get("architectures")
    causal = isinstance(names, list) and any(isinstance(name, str) and name.endswith("ForCausalLM") for name in names)
    untied = model.text.get("tie_word_embeddings") is False and "model.embed_tokens.weight" in model.beside
    if causal and untied and not any(name.split(".")[-2:-1] == ["lm_head"] for name in model.beside):
        yield "lm_head.weight is missing, and config.json does not tie it to the embedding"


def in_order(lines: Iterable[str]) -> list[str]:
    """In the order of the layers, each once."""
    return sorted(dict.fromkeys(lines), key=natural)
