"""One decoder layer of the public transformers model, built empty and filled from the index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from streamconv.checkpoint.index import Index
from streamconv.errors import CheckpointError, TensorError, printable


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
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            self.config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{printable(str(folder))}: transformers cannot read it: {str(error).splitlines()[0]}") from error
        self.index, self.dtype, self.device = index, dtype, device
        self.layers = int(self.config.num_hidden_layers)
        self._kinds = list(getattr(self.config, "layer_types", None) or [])
        self.config.num_hidden_layers = 1
        self.config.use_cache = False
        if self._kinds:
            self.config.layer_types = self._kinds[:1]
        build: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = build.from_config(self.config, dtype=dtype)
        self.body: Any = model.model
        self.body.norm = torch.nn.Identity()
        self.body.embed_tokens = torch.nn.Identity()
        self.layer: Any = self.body.layers[0]
        self.layer.to_empty(device=device)
        # buffers of the rotary embedding hold values, so that part is made for real
        self.body.rotary_emb = type(self.body.rotary_emb)(self.config).to(device)
        self.body.eval()

    def load(self, number: int) -> None:
        """Fill the layer with the weights of layer `number`."""
        if self._kinds:
            self.config.layer_types = [self._kinds[number]]
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                source = read_tensor(self.index, f"model.layers.{number}.{name}")
                if source.shape != parameter.shape:
                    raise TensorError(f"model.layers.{number}.{name}: shape {list(source.shape)}, not {list(parameter.shape)}")
                parameter.copy_(source.to(self.dtype))

    def linears(self, number: int) -> Iterator[tuple[str, torch.nn.Linear]]:
        """(full name, module) of the layer's linear modules."""
        for name, module in self.layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield f"model.layers.{number}.{name}", module

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedding rows of token ids [tokens] -> [tokens, hidden], read one by one from the source."""
        record = self.index.tensors.get("model.embed_tokens.weight")
        if record is None:
            raise TensorError("missing tensor model.embed_tokens.weight")
        unique, places = torch.unique(ids, return_inverse=True)
        if int(unique.max()) >= record.shape[0]:
            raise CheckpointError("the tokenizer knows more tokens than the embedding has rows")
        rows = [read_tensor(self.index, "model.embed_tokens.weight", slice(i, i + 1)) for i in unique.tolist()]
        return torch.cat(rows).to(self.dtype)[places]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] through the layer."""
        out: torch.Tensor = self.body(inputs_embeds=states, use_cache=False).last_hidden_state
        return out
