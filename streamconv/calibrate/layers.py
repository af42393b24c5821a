"""One decoder layer of the public transformers model, built empty and filled from the index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from streamconv.checkpoint.index import Index
from streamconv.errors import CheckpointError, TensorError, printable
from streamconv.memory import MIB

_PIECE = 4 * MIB
"""Bytes of a tensor that are read at a time."""


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
        folder: the model folder (config.json).
        index: the opened source.
        dtype: computing type.
        device: torch device.
    """

    def __init__(self, folder: Path, index: Index, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoConfig

        try:
            self.config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{printable(str(folder))}: transformers cannot read it: {str(error).splitlines()[0]}") from error
        self.index, self.dtype, self.device = index, dtype, device
        self.layers = int(self.config.num_hidden_layers)
        self._kinds = list(getattr(self.config, "layer_types", None) or [])
        self._states: torch.Tensor | None = None
        self._build(self._kinds[:1])

    def _build(self, kinds: list[str]) -> None:
        """The model with one layer of a kind of attention, empty."""
        from transformers import AutoModelForCausalLM

        build: Any = AutoModelForCausalLM
        self._built = kinds
        self.config.num_hidden_layers = 1
        self.config.use_cache = False
        if kinds:
            self.config.layer_types = kinds
        with torch.device("meta"):
            model = build.from_config(self.config, dtype=self.dtype)
        self.body: Any = model.model
        self.body.norm = torch.nn.Identity()
        self._embedding: Any = self.body.embed_tokens
        scale = getattr(self._embedding, "scalar_embed_scale", None)
        if scale is not None:  # a buffer holds a value, so it is made for real
            self._embedding.embed_scale = torch.tensor(scale)
        self.body.embed_tokens = torch.nn.Identity()
        self.layer: Any = self.body.layers[0]
        self.layer.to_empty(device=self.device)
        self.layer.register_forward_pre_hook(self._enter)
        self.body.rotary_emb = type(self.body.rotary_emb)(self.config).to(self.device)
        self.body.eval()

    def _enter(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Some models scale what comes from the embedding inside; past layer 0 the states are what they are."""
        return inputs if self._states is None else (self._states, *inputs[1:])

    def load(self, number: int) -> None:
        """Fill the layer with the weights of layer `number`."""
        if self._kinds[number : number + 1] != self._built:
            self._build(self._kinds[number : number + 1])
        self.number = number
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                full = f"model.layers.{number}.{name}"
                record = self.index.tensors.get(full)
                if record is None:
                    raise TensorError(f"missing tensor {printable(full)}")
                if record.shape != tuple(parameter.shape):
                    raise TensorError(f"{printable(full)}: shape {list(record.shape)}, not {list(parameter.shape)}")
                rows = record.shape[0]
                step = max(1, _PIECE // max(1, record.nbytes // rows))
                for start in range(0, rows, step):  # in pieces: a whole matrix beside the layer would be the peak
                    piece = slice(start, min(start + step, rows))
                    parameter[piece].copy_(read_tensor(self.index, full, piece))

    def linears(self, number: int) -> Iterator[tuple[str, torch.nn.Linear]]:
        """(full name, module) of the layer's linear modules."""
        for name, module in self.layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield f"model.layers.{number}.{name}", module

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedding of token ids [tokens] -> [tokens, hidden]; only the rows that occur are read from the source."""
        record = self.index.tensors.get("model.embed_tokens.weight")
        if record is None:
            raise TensorError("missing tensor model.embed_tokens.weight")
        unique, places = torch.unique(ids, return_inverse=True)
        if int(unique.max()) >= record.shape[0]:
            raise CheckpointError("the tokenizer knows more tokens than the embedding has rows")
        rows = [read_tensor(self.index, "model.embed_tokens.weight", slice(i, i + 1)) for i in unique.tolist()]
        self._embedding.weight = torch.nn.Parameter(torch.cat(rows).to(self.dtype), requires_grad=False)
        made: torch.Tensor = self._embedding(places)
        return made

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] through the layer."""
        self._states = states if self.number else None
        out: torch.Tensor = self.body(inputs_embeds=states, use_cache=False).last_hidden_state
        self._states = None
        return out
