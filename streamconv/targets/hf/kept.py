"""What --quant keep makes of a source: tensors of codes as they are, and scales, of which what `verify` would refuse is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import FLOATS, I64
from streamconv.checkpoint.rows import Derived, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import CheckpointError, printable
from streamconv.lazy import Bytes
from streamconv.planning.matrix_table import Named
from streamconv.quants.base import Codec
from streamconv.quants.given_codes import GivenIntegers
from streamconv.quants.plain import Plain
from streamconv.targets.hf import config_json
from streamconv.targets.hf.check_scales import has_values_to_check, wrong_scales
from streamconv.targets.hf.ignored import ignored
from streamconv.targets.hf.side_files import OLD, side_files

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.planning.draft import Draft

ZERO_POINTS = "the weights have zero points: vLLM reads them, transformers (5.24 with compressed-tensors 0.20) does not"


@dataclass(slots=True)
class Kept:
    """The output of --quant keep.

    Attributes:
        container: of the output.
        wrong: (name, bytes, dtype) -> what of a copied tensor cannot be, in words.
        modules: names of what is quantized.
        quantization: `quantization_config` of the output; None leaves the source's.
        second: ModelOpt's file of its own.
        tensors: output tensor -> (number of the source's file, about how many bytes of it, what adds it to a file of the draft); in the
            order of the source.
    """

    container: str
    draft: Draft
    wrong: Callable[[str, bytes, str], str] = wrong_scales
    modules: list[str] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    second: bytes | None = None
    tensors: dict[str, tuple[int, int, Callable[[int], None]]] = field(default_factory=dict)

    def add(self, name: str, source: SourceTensor, codec: Codec, shape: tuple[int, ...]) -> None:
        if isinstance(codec, Plain) and has_values_to_check(name):
            own = (source.name, source.dtype, source.shape, source.pieces, source.axis)
            whole = name.endswith(("g_idx", ".weight_shape"))
            source = CheckedValues(*own, stored=source, wrong=lambda data: self.wrong(name, data, codec.dtype.name), whole=whole)

        def feed(file: int) -> None:
            matrix = self.draft.matrix(file, name, source.rows, source.cols, codec, spelling=Named(shape))
            self.draft.feed(matrix, source, 0, source.rows)

        self._put(name, source, source.nbytes, feed)

    def copy(self, name: str, source: SourceTensor, shape: tuple[int, ...] | None = None) -> None:
        self.add(name, source, Plain(source.dtype), source.shape if shape is None else shape)

    def pack(self, module: str, codes: PackedTensor, key: str, scales: SourceTensor, zeros: tuple[SourceTensor, Codec] | None) -> None:
        """Integers as compressed-tensors packs them.

        Args:
            key: of the zero points that are to be none; "" if there are some.
            scales: [N, groups].
            zeros: zero points, int32 [N * bits / 32, groups], and how they are stored.
        """
        n, k = codes.shape
        self.add(f"{module}.weight_packed", codes, GivenIntegers("words", codes.bits, key), (n, k * codes.bits // 32))
        self.copy(f"{module}.weight_scale", scales)
        if zeros is not None:
            self.add(f"{module}.weight_zero_point", *zeros, zeros[0].shape)
        name, data = f"{module}.weight_shape", struct.pack("<2q", n, k)
        self._put(name, codes, len(data), lambda file: self.draft.constant(file, name, I64, (2,), data))

    def _put(self, name: str, source: SourceTensor, nbytes: int, feed: Callable[[int], None]) -> None:
        if name in self.tensors:
            raise CheckpointError(f"{printable(name)} would be there twice")
        self.tensors[name] = source.pieces[0].shard, nbytes, feed

    def describe(self, index: Index, most: int | None) -> None:
        """Describe all of it to the draft.

        Args:
            most: as of `config_json.shards_of`.
        """
        sizes = ((name, file, nbytes) for name, (file, nbytes, _) in self.tensors.items())
        for file, names in config_json.shards_of(index, sizes, most).items():
            number = self.draft.file(file, {"format": "pt"})
            for name in names:
                self.tensors[name][2](number)
        copied, left_out = side_files(index, OLD if self.quantization is None else ())
        self.draft.warnings += left_out
        self.draft.side_files += copied
        config_json.add_index(self.draft)
        if self.second is not None:
            self.draft.side_file("hf_quant_config.json", self.second)
        config, quantization = index.config, self.quantization
        content = config_json.kept_config(config) if quantization is None else config_json.output_config(config, quantization, None)
        self.draft.side_file("config.json", content)
        self.draft.decisions["weights"] = f"kept as they are, in the container {self.container}"


@dataclass(frozen=True, slots=True)
class CheckedValues(Derived):
    """A tensor as `stored` reads it.

    Attributes:
        wrong: what of its bytes cannot be, in words; "" if all is well.
        whole: only all of them together can be judged: an order, a shape.
    """

    wrong: Callable[[bytes], str] = field(kw_only=True)
    whole: bool = field(kw_only=True)

    @property
    def row_align(self) -> int:
        return self.rows if self.whole else self.stored.row_align

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        """Rows [start, stop).

        Raises:
            CheckpointError: they hold what no engine computes with.
        """
        self.stored.read(shards, start, stop, out, scratch)
        odd = self.wrong(out[: (stop - start) * self.cols * self.dtype.itemsize].tobytes())
        if odd:
            file = printable(shards[self.pieces[0].shard].path.name)
            message = f"{file}: {printable(self.name)} holds {odd}"
            hint = "--quant none decodes a scale of 0 and any order; all else is damage: make the checkpoint again"
            raise CheckpointError(message, hint=hint)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        self.stored.drop_page_cache(shards, start, stop)


def compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of kept codes: args of weights, and of inputs where these are quantized."""
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": dict(weights), "format": form}
    return config_json.compressed(form, scheme | ({"input_activations": dict(inputs)} if inputs is not None else {}), ignore)


def left(tensors: Mapping[str, SourceTensor], quantized: list[str], container: str) -> list[str]:
    """What the config says of every linear-like module that is stored as floats."""
    fields = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype.name in FLOATS
    }
    return ignored(fields - {*quantized}, quantized, container)
