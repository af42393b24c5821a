"""One decoder layer of the public transformers model, built empty and filled from the index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch

from streamconv.calibration import pretrained
from streamconv.calibration.graphs import Graphs, Shape
from streamconv.calibration.names import GROUPED, Names, Place
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.tensor_table import TensorRecord
from streamconv.errors import CheckpointError, TensorError, printable
from streamconv.families import Family
from streamconv.memory import MIB

_PIECE = 4 * MIB
"""Bytes of a tensor that are read at a time."""

_NEAR = 64 << 10
"""Bytes between two rows that are read rather than skipped."""


def read_rows(index: Index, record: TensorRecord, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor of the source; leading dimensions are flattened into rows, a vector is a column."""
    width = record.shape[-1] if len(record.shape) > 1 else 1
    each = width * record.dtype.itemsize
    data = torch.empty((stop - start) * each, dtype=torch.uint8)
    if data.numel():
        index.shards[record.shard].read_into(record.begin + start * each, data.numpy().data)
    rows = data.view(getattr(torch, record.dtype.torch))
    return rows.reshape(-1, width) if len(record.shape) > 1 else rows


class OneLayer:
    """A model with a single decoder layer whose weights are replaced layer by layer.

    The final norm is an identity, so that hidden states in are hidden states out; masks and rotary embeddings are the
    library's own.

    Args:
        dtype: computing type.
        uses: how often states of each shape will go through every layer.
        watch: puts hooks on a layer that was built.

    Attributes:
        index, facts, family: as given.
        layers: how many the model has.
        places: parameter of the loaded layer -> where it comes from.
        layer: transformers' layer, with the weights of the one that is loaded.
    """

    def __init__(
        self, index: Index, model: ModelConfig, family: Family, dtype: torch.dtype, device: str, uses: Counter[Shape],
        watch: Callable[[torch.nn.Module], None],
    ) -> None:  # fmt: skip
        self.config = pretrained.read_config(index, model, family)
        self.index, self.facts, self.family, self.dtype, self.device, self.uses = index, model, family, dtype, device, uses
        self.layers = model.num_hidden_layers
        self._told = f"{printable(index.root)}: transformers cannot run this model"
        self._states: torch.Tensor | None = None
        self._watch = watch
        self.names = Names(index, family, pretrained.architecture(self.config))
        with pretrained.told(self._told):
            self._kinds = list(getattr(self.config, "layer_types", None) or [])
            self._build(self._kinds[:1])

    def _build(self, kinds: list[str]) -> None:
        """The model with one layer of a kind of attention, empty."""
        self._built = kinds
        self.config.num_hidden_layers = 1
        self.config.use_cache = False
        if kinds:
            self.config.layer_types = kinds
        self.body: Any = pretrained.empty_model(self.config, self.dtype).model
        self.body.norm = torch.nn.Identity()
        self._embedding: Any = self.body.embed_tokens
        scale = getattr(self._embedding, "scalar_embed_scale", None)
        if scale is not None:  # a buffer holds a value, so it is made for real
            self._embedding.embed_scale = torch.tensor(scale)
        self.body.embed_tokens = torch.nn.Identity()
        self.layer: Any = self.body.layers[0]
        unstacked(self.layer)
        if "qkv_grouped" in self.family.tensors:
            group(self.layer, self.facts.num_attention_heads // self.facts.num_key_value_heads, self.facts.head_size)
        self.places = self.places_of(0)  # before there is memory for what config.json says
        self.layer.to_empty(device=self.device)
        self.layer.register_forward_pre_hook(self._enter)
        self.body.rotary_emb = type(self.body.rotary_emb)(self.config).to(self.device)
        self.body.eval()
        self._watch(self.layer)
        same = len(set(self._kinds)) <= 1  # else the layer, and its graphs, are built anew time and again
        self._graphs = Graphs(self.device, Counter({shape: count * (self.layers if same else 1) for shape, count in self.uses.items()}))

    def _enter(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Some models scale what comes from the embedding inside; past layer 0 the states are what they are."""
        return inputs if self._states is None else (self._states, *inputs[1:])

    def load(self, number: int) -> None:
        """Fill the layer with the weights of layer `number`."""
        if self._kinds[number : number + 1] != self._built:
            with pretrained.told(self._told):
                self._build(self._kinds[number : number + 1])
        self.number, self.places = number, self.places_of(number)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                place = self.places[name]
                step = max(1, _PIECE * place.rows // max(1, parameter.numel() * place.record.dtype.itemsize))
                for start in range(0, place.rows, step):  # in pieces: a whole matrix beside the layer would be the peak
                    stop = min(start + step, place.rows)
                    piece = read_rows(self.index, place.record, place.start + start, place.start + stop)
                    parameter[start:stop].copy_(piece.to(self.device))  # converted there

    def places_of(self, number: int) -> dict[str, Place]:
        """Where the parameters of layer `number` come from. Raises TensorError: one is missing, or of another shape."""
        return {name: self.names.place(number, name, tuple(p.shape)) for name, p in self.layer.named_parameters()}

    def embed(self, samples: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """The embedding [tokens, hidden] of each sample, on the device; only rows that occur, and those between, are read."""
        record = self.index.tensors.get(self.names.embedding())
        if record is None:
            raise TensorError(f"missing tensor {self.names.embedding()}")
        unique, places = torch.unique(torch.tensor([token for sample in samples for token in sample]), return_inverse=True)
        if int(unique[-1]) >= record.shape[0]:
            raise CheckpointError("the tokenizer knows more tokens than the embedding has rows")
        rows = torch.empty(len(unique), record.shape[1], dtype=self.dtype, device=self.device)
        for begin, end in _runs(unique.tolist(), record.nbytes // record.shape[0]):
            first, last = int(unique[begin]), int(unique[end - 1])
            piece = read_rows(self.index, record, first, last + 1).to(self.device)
            rows[begin:end] = piece[(unique[begin:end] - first).to(self.device)].to(self.dtype)
        self._embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        for mine in places.to(self.device).split([len(sample) for sample in samples]):
            with pretrained.told(self._told):
                states: torch.Tensor = self._embedding(mine)
            yield states

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [samples, tokens, hidden] through the layer; what comes back is good until the next call."""
        with pretrained.told(self._told):
            return self._graphs.run(self._forward, states, self.number == 0)

    def _forward(self, states: torch.Tensor) -> torch.Tensor:
        self._states = states if self.number else None
        out: torch.Tensor = self.body(inputs_embeds=states, use_cache=False).last_hidden_state
        self._states = None
        return out


def _runs(rows: list[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of places in a rising list of rows that are read at once."""
    near, most, begin = _NEAR // row_bytes, max(1, _PIECE // row_bytes), 0
    for place in range(1, len(rows)):
        if rows[place] - rows[place - 1] > max(1, near) or rows[place] - rows[begin] >= most:
            yield begin, place
            begin = place
    if rows:
        yield begin, len(rows)


class _Queries(torch.nn.Module):
    """Called first: all of the matrix; the other two take their parts of it. `heads`: query heads of a KV head."""

    def __init__(self, like: torch.nn.Linear, rows: int, heads: int, size: int) -> None:
        super().__init__()
        facts: dict[str, Any] = {"bias": False, "dtype": like.weight.dtype, "device": like.weight.device}
        self.add_module(GROUPED, torch.nn.Linear(like.in_features, rows, **facts))
        self._heads, self._size = heads, size
        self.parts: tuple[torch.Tensor, ...] = ()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., query heads * D]."""
        grouped: torch.Tensor = self.get_submodule(GROUPED)(states)
        each = grouped.reshape(*grouped.shape[:-1], -1, self._heads + 2, self._size)
        self.parts = tuple(part.flatten(-3) for part in torch.split(each, [self._heads, 1, 1], -2))
        return self.parts[0]


class _Part(torch.nn.Module):
    """Keys or values of what the queries made."""

    def __init__(self, whole: _Queries, number: int) -> None:
        super().__init__()
        self._whole, self._number = [whole], number  # in a list: it is no module of this one

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., KV heads * D]."""
        return self._whole[0].parts[self._number]


def group(layer: torch.nn.Module, heads: int, size: int) -> None:
    """Replace the three projections of a layer's attention. `heads`: query heads of a KV head."""
    attention: Any = layer.get_submodule("self_attn")
    rows = sum(getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    whole = _Queries(attention.q_proj, rows, heads, size)
    attention.q_proj, attention.k_proj, attention.v_proj = whole, _Part(whole, 1), _Part(whole, 2)


class Expert(torch.nn.Module):
    """One expert: gate, up and down projection."""

    def __init__(self, hidden: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        facts: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj = torch.nn.Linear(hidden, width, **facts)
        self.up_proj = torch.nn.Linear(hidden, width, **facts)
        self.down_proj = torch.nn.Linear(width, hidden, **facts)


class Experts(torch.nn.ModuleList):
    """In the place of transformers' stacked experts: the same sum over the experts that the router chose.

    Args:
        stacked: transformers' module, with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
    """

    def __init__(self, stacked: Any) -> None:
        count, _, hidden = stacked.gate_up_proj.shape
        super().__init__(Expert(hidden, stacked.down_proj.shape[2], stacked.gate_up_proj) for _ in range(count))
        self.act: Any = stacked.act_fn

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens [n, H], experts of each token [n, k] and their weights [n, k] -> [n, H]."""
        out, act = torch.zeros_like(states), cast(Callable[[torch.Tensor], torch.Tensor], self.act)
        for number, expert in enumerate(cast(Iterable[Expert], self)):
            token, rank = torch.where(chosen == number)
            if not len(token):
                continue
            mine = states[token]
            output = expert.down_proj(act(expert.gate_proj(mine)) * expert.up_proj(mine))
            out.index_add_(0, token, (output * weights[token, rank, None]).to(out.dtype))
        return out


def unstacked(layer: torch.nn.Module) -> None:
    """Replace the stacked experts of a layer, if it has some."""
    for name, module in list(layer.named_modules()):
        stacks = [getattr(module, part, None) for part in ("gate_up_proj", "down_proj")]
        if all(isinstance(stack, torch.nn.Parameter) and stack.dim() == 3 for stack in stacks):
            above, _, last = name.rpartition(".")
            setattr(layer.get_submodule(above), last, Experts(module))
