"""One decoder layer of the public transformers model, built empty and filled from the index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from streamconv.calibration import pretrained
from streamconv.calibration.graphs import Graphs, Shape
from streamconv.calibration.maxima import Maxima
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.tensor_table import TensorRecord
from streamconv.errors import CheckpointError, TensorError, printable
from streamconv.memory import MIB

_PIECE = 4 * MIB
"""Bytes of a tensor that are read at a time."""

_NEAR = 64 << 10
"""Bytes between two rows that are read rather than skipped."""


def read_tensor(index: Index, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor of the source, whole or some rows of it.

    Raises:
        TensorError: the source has no such tensor.
    """
    record = index.tensors.get(name)
    if record is None:
        raise TensorError(f"missing tensor {printable(name)}")
    dtype = getattr(torch, record.dtype.torch)
    shape, begin, size = record.shape, record.begin, record.nbytes
    if rows is not None:
        each = size // shape[0]
        begin, size = begin + rows.start * each, (rows.stop - rows.start) * each
        shape = (rows.stop - rows.start, *shape[1:])
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        index.shards[record.shard].read_into(begin, data.numpy().data)
    return data.view(dtype).reshape(shape)


class OneLayer:
    """A model with a single decoder layer whose weights are replaced layer by layer.

    The final norm is an identity, so that hidden states in are hidden states out; masks and rotary embeddings are the
    library's own.

    Args:
        index: the opened source.
        model: what its config.json says.
        dtype: computing type.
        device: torch device.
        uses: how often states of each shape will go through every layer.

    Attributes:
        layers: how many the model has.
        maxima: of the layer that is loaded.
    """

    def __init__(self, index: Index, model: ModelConfig, dtype: torch.dtype, device: str, uses: Counter[Shape]) -> None:
        self.config = pretrained.read_config(index, model)
        self.index, self.dtype, self.device, self.uses = index, dtype, device, uses
        self.layers = model.num_hidden_layers
        self._told = f"{printable(str(index.root))}: transformers cannot run this model"
        self._states: torch.Tensor | None = None
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
        for name, parameter in self.layer.named_parameters():  # before there is memory for what config.json says
            self._record(f"model.layers.0.{name}", parameter)
        self.layer.to_empty(device=self.device)
        self.layer.register_forward_pre_hook(self._enter)
        self.body.rotary_emb = type(self.body.rotary_emb)(self.config).to(self.device)
        self.body.eval()
        self.maxima = Maxima(self.layer)
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
        self.number = number
        self.maxima.clear()
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                full = f"model.layers.{number}.{name}"
                record = self._record(full, parameter)
                rows = record.shape[0]
                step = max(1, _PIECE // max(1, record.nbytes // rows))
                for start in range(0, rows, step):  # in pieces: a whole matrix beside the layer would be the peak
                    piece = slice(start, min(start + step, rows))
                    parameter[piece].copy_(read_tensor(self.index, full, piece).to(self.device))  # converted there

    def _record(self, name: str, parameter: torch.Tensor) -> TensorRecord:
        """What the source has for a parameter.

        Raises:
            TensorError: it is missing, or of another shape.
        """
        record = self.index.tensors.get(name)
        if record is None:
            raise TensorError(f"missing tensor {printable(name)}")
        if record.shape != tuple(parameter.shape):
            raise TensorError(f"{printable(name)}: shape {list(record.shape)}, not {list(parameter.shape)}")
        return record

    def ranges(self) -> dict[str, torch.Tensor]:
        """`M.x`, `M.y` and `M.w` of the loaded layer's linear modules, by their full names; float32."""
        return self.maxima.told(f"model.layers.{self.number}.")

    def embed(self, samples: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """The embedding [tokens, hidden] of each sample, on the device; only rows that occur, and those between, are read."""
        record = self.index.tensors.get("model.embed_tokens.weight")
        if record is None:
            raise TensorError("missing tensor model.embed_tokens.weight")
        unique, places = torch.unique(torch.tensor([token for sample in samples for token in sample]), return_inverse=True)
        if int(unique[-1]) >= record.shape[0]:
            raise CheckpointError("the tokenizer knows more tokens than the embedding has rows")
        rows = torch.empty(len(unique), record.shape[1], dtype=self.dtype, device=self.device)
        for begin, end in _runs(unique.tolist(), record.nbytes // record.shape[0]):
            first, last = int(unique[begin]), int(unique[end - 1])
            piece = read_tensor(self.index, "model.embed_tokens.weight", slice(first, last + 1)).to(self.device)
            rows[begin:end] = piece[(unique[begin:end] - first).to(self.device)].to(self.dtype)
        self._embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        for mine in places.to(self.device).split([len(sample) for sample in samples]):
            with pretrained.told(self._told):
                made: torch.Tensor = self._embedding(mine)
            yield made

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
