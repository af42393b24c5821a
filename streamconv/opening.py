"""`streamconv.open`: any checkpoint as a mapping of tensors that are read when they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from types import TracebackType
from typing import Any

from streamconv.arguments import path_of
from streamconv.checkpoint.index import Index, nearest
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.checkpoint.stored import Chosen, Stored, everything, select, shape_of
from streamconv.errors import TensorError, UsageError, printable
from streamconv.hub import open_stored
from streamconv.lazy import np, torch
from streamconv.memory import show_size


class LazyTensor:
    """A tensor, or a slice of one, that has not been read.

    Indexing with ints, slices and `...` gives another LazyTensor and reads nothing. `numpy()` and `torch()` then read: of a local file
    they give views of its mapping, which copy nothing, and the system reads the pages that are used; of a model of the Hub they
    request the bytes from the first to the last element; of a Meta checkpoint they copy what lies in more than one file.

    The memory of a view is shared with all views of the same file from the same `open`, and stays valid after `close`. It is never
    written back. A file that is truncated while a view of it is in use ends the process (SIGBUS), as with any mapping.
    """

    __slots__ = ("_chosen", "_stored", "name")

    def __init__(self, name: str, stored: Stored, chosen: Chosen | None = None) -> None:
        self.name = name
        self._stored = stored
        self._chosen = everything(stored.sizes) if chosen is None else chosen

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements in each dimension."""
        return shape_of(self._chosen)

    @property
    def dtype(self) -> str:
        """The name that safetensors gives the type: "BF16", "F16", "F32", "F8_E4M3", "I32", "BOOL", ..."""
        return self._stored.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the elements: their number times the size of one."""
        return self._stored.dtype.itemsize * prod(self.shape)

    def numpy(self, *, raw: bool = False) -> np.ndarray[Any, Any]:
        """The values as a read-only array of `shape`.

        Args:
            raw: give the unsigned integers that carry the bits: uint16 for BF16 and F16, uint8 for F8, ...

        Raises:
            UsageError: numpy has no such type (BF16, F8), and `raw` was not asked for.
            CheckpointError: the file changed or cannot be read. HubError: the Hub did not give the bytes.
        """
        kind = self._stored.dtype
        if kind.numpy is None and not raw:
            raise UsageError(
                f"{printable(self.name)} is {kind}, a type that numpy does not have",
                hint=f"torch() has it; numpy(raw=True) gives the bits as uint{8 * kind.itemsize}",
            )
        values = self._stored.read(self._chosen)
        array = values if raw or kind.numpy is None else values.view(kind.numpy)
        array.flags.writeable = False
        return array

    def torch(self) -> torch.Tensor:
        """The values as a CPU tensor of `shape`, a view of the file where that is possible.

        Writing to it is safe and changes no file, but what other views of the same file show: `clone()` it first.

        Raises:
            UsageError: this release of torch has no such type.
            CheckpointError, HubError: as numpy.
        """
        kind = self._stored.dtype
        dtype = getattr(torch, kind.torch, None)
        if dtype is None:
            raise UsageError(f"{printable(self.name)} is {kind}, a type that torch {torch.__version__} does not have")
        values = self._stored.read(self._chosen)
        if not (values.flags.writeable and values.flags.aligned and min(values.strides, default=0) >= 0):
            values = values.copy()  # torch knows neither read-only memory nor negative strides
        return torch.from_numpy(values.view(f"i{kind.itemsize}")).view(dtype)

    def __getitem__(self, key: Any) -> LazyTensor:
        """A part of the tensor, not read either.

        Raises:
            UsageError: no such element, or an index that is neither int, slice nor `...`; it is an IndexError, too.
        """
        return LazyTensor(self.name, self._stored, select(self._chosen, key, printable(self.name)))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[LazyTensor]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return np.array(array, dtype) if copy or dtype not in (None, array.dtype) else array

    def __repr__(self) -> str:
        return f"LazyTensor({printable(self.name)!r}, {self.dtype}, {list(self.shape)})"


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
        self._index, self._tensors = index, SourceTensors(index)

    def __getitem__(self, name: str) -> LazyTensor:
        """A tensor.

        Raises:
            TensorError: there is none of this name (a KeyError, too); the hint names the nearest.
        """
        if name not in self._index.tensors:
            near = nearest(name, self._index.tensors) if isinstance(name, str) else None
            hint = f"did you mean {printable(near)}?" if near else None
            raise NoSuchTensor(f"no tensor {printable(name)} in {printable(self._index.root)}", hint=hint)
        return LazyTensor(name, Stored(self._tensors[name], self._index.shards))

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.tensors)

    def __len__(self) -> int:
        return len(self._index.tensors)

    def __repr__(self) -> str:
        size = show_size(sum(record.nbytes for record in self._index.tensors.values()))
        return f"<Checkpoint {printable(self._index.root)}: {len(self)} tensors, {size} in {len(self._index.shards)} files>"

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
