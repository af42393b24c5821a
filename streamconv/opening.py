"""`streamconv.open`: any checkpoint as a mapping of tensors that are read when they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from streamconv.arguments import path_of
from streamconv.checkpoint.index import Index, nearest
from streamconv.checkpoint.lazy_tensor import LazyTensor
from streamconv.checkpoint.stored import stored
from streamconv.errors import TensorError, printable
from streamconv.hub import open_stored
from streamconv.memory import show_size


class NoSuchTensor(TensorError, KeyError):
    """A name that the checkpoint does not hold; a KeyError, as of any mapping."""


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by the names that its files give them, in the order of the files. Nothing is read until it is used.

    A context manager. Tensors outlive it: the files are opened again when one is read later.

    Attributes:
        config: config.json, or Meta's params.json; empty where there is none.
    """

    def __init__(self, index: Index) -> None:
        self.config: dict[str, Any] = index.config
        self._index = index

    def __getitem__(self, name: str) -> LazyTensor:
        """A tensor.

        Raises:
            TensorError: there is none of this name (a KeyError, too); the hint names the nearest.
        """
        if name not in self._index.tensors:
            near = nearest(name, self._index.tensors) if isinstance(name, str) else None
            hint = f"did you mean {printable(near)}?" if near else None
            raise NoSuchTensor(f"no tensor {printable(str(name))} in {printable(str(self._index.root))}", hint=hint)
        return LazyTensor(name, stored(self._index, name))

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.tensors)

    def __len__(self) -> int:
        return len(self._index.tensors)

    def __repr__(self) -> str:
        size = show_size(sum(record.nbytes for record in self._index.tensors.values()))
        return f"<Checkpoint {printable(str(self._index.root))}: {len(self)} tensors, {size} in {len(self._index.shards)} files>"

    def close(self) -> None:
        """Close the files. Arrays and tensors that were made stay valid."""
        self._index.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open(model: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint; reads headers, and no weight.

    Args:
        model: a Hugging Face folder (safetensors or `.bin`), a Meta folder, one weight file (config.json need not be there), or a
            model of the Hub (org/name[@revision]), of which only what is used is requested.

    Raises:
        CheckpointError: there is none, or it breaks a rule of its format. TensorError: a tensor is in two files.
        HubError: the Hub did not give it.
    """
    return Checkpoint(open_stored(path_of(model, "model"), tensors_only=True))
