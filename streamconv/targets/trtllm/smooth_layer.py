"""A decoder layer under SmoothQuant: which weights share a smoother, and the tensors that come with it.

Maxima are taken over whole matrices, so the integers and scales do not depend on the tensor parallel split.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.rows import Extent, NoSource, SourceTensor
from streamconv.quants.base import Codec
from streamconv.quants.smooth_values import SmoothNorm, SmoothValue
from streamconv.quants.smoothing import InputChannelAmax, Smoother
from streamconv.quants.smoothquant import HALF, SmoothWeight
from streamconv.targets.trtllm.parallel import Rank, even

if TYPE_CHECKING:
    from streamconv.targets.trtllm.rank_layout import RankLayout

_ONE = struct.pack("<f", 1.0)


def module_of(tensor: SourceTensor) -> str:
    """ "model.layers.0.mlp.up_proj" of its weight."""
    return tensor.name.removesuffix(".weight")


def _columns(tensor: SourceTensor) -> str:
    """Key of its column maxima."""
    return f"columns of {tensor.name}"


@dataclass(slots=True)
class SmoothLayer:
    """Describes one layer to the layout's draft; `prefix` ends with a dot."""

    layout: RankLayout
    ranges: Ranges
    ranks: list[Rank]
    layer: int
    prefix: str

    def describe(self) -> None:
        model = self.layout.model
        hidden, width, size = model.hidden_size, model.intermediate_size, model.head_size
        q_rows, kv_rows = model.num_attention_heads * size, self.layout.kv * size
        shapes = {
            "q": (q_rows, hidden),
            "k": (kv_rows, hidden),
            "v": (kv_rows, hidden),
            "o": (hidden, q_rows),
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        }
        found = {role: self.layout.roles.require(role, shape, self.layer) for role, shape in shapes.items()}
        norms = [self.layout.roles.require(role, (hidden,), self.layer) for role in ("input_norm", "post_norm")]
        weights = {role: tensor for role, tensor in found.items() if tensor is not None}
        if len(weights) < len(shapes) or norms[0] is None or norms[1] is None:
            return  # reported by `roles`
        wanted = {}
        for tensor in weights.values():
            wanted[module_of(tensor) + ".x"] = tensor.cols
            wanted[module_of(tensor) + ".y"] = tensor.rows
        self.ranges.check(wanted)
        attention, mlp = (weights["q"], weights["k"], weights["v"]), (weights["gate"], weights["up"])
        self._qkv(norms[0], attention)
        self._rows("attention", "dense", weights["o"])
        self._mlp_in(norms[1], mlp)
        self._rows("mlp", "proj", weights["down"])

    # ---- groups

    def _smoother(self, *weights: SourceTensor) -> Smoother:
        names = " and ".join(tensor.name for tensor in weights)
        keys = tuple(_columns(tensor) for tensor in weights)
        for tensor, key in zip(weights, keys, strict=True):
            self.layout.builder.reduce(tensor, InputChannelAmax(key))
        options = self.layout.options
        return Smoother(keys, names, self.ranges, module_of(weights[0]), options.smoothquant, options.target_version != "0.16")

    def _largest(self, tensor: SourceTensor) -> tuple[tuple[str, str], ...]:
        """(source, key of its maxima), where one scale serves the matrix."""
        return () if self.layout.options.per_channel else ((tensor.name, _columns(tensor)),)

    def _outputs(self, *weights: SourceTensor) -> float | None:
        if self.layout.options.per_token:
            return None
        return self.ranges.amax([module_of(tensor) + ".y" for tensor in weights])

    def _qkv(self, norm: SourceTensor, weights: tuple[SourceTensor, ...]) -> None:
        layout = self.layout
        smoother, outputs = self._smoother(*weights), self._outputs(*weights)
        self._norm("input_layernorm", norm, smoother)
        largest = tuple(pair for tensor in weights for pair in self._largest(tensor))
        grouped = layout.kv != layout.model.num_attention_heads
        codec = SmoothWeight(smoother, HALF, outputs, largest, divide=grouped, single=False)
        layout.decisions.setdefault("attention.qkv", codec.name)
        each = (layout.model.num_attention_heads + 2 * layout.kv) // layout.mapping.tp_size * layout.model.head_size
        made = [layout.builder.matrix(rank.file, self.prefix + "attention.qkv", each, weights[0].cols, codec) for rank in self.ranks]
        for number, rank in enumerate(self.ranks):
            for tensor in weights:
                layout.builder.feed(made[number], tensor, *even(tensor.rows, layout.mapping.tp_size, rank.tp))
        self._act_scale("attention.qkv", outputs)

    def _mlp_in(self, norm: SourceTensor, weights: tuple[SourceTensor, ...]) -> None:
        smoother = self._smoother(*weights)
        self._norm("post_layernorm", norm, smoother)
        for name, tensor in zip(("mlp.fc", "mlp.gate"), weights, strict=True):
            largest, outputs = self._largest(tensor), self._outputs(tensor)
            codec = SmoothWeight(smoother, self.layout.dtype, outputs, largest)
            self.layout.decisions.setdefault(name, codec.name)
            for rank in self.ranks:
                start, stop = even(tensor.rows, self.layout.mapping.tp_size, rank.tp)
                matrix = self.layout.builder.matrix(rank.file, self.prefix + name, stop - start, tensor.cols, codec)
                self.layout.builder.feed(matrix, tensor, start, stop)
            self._act_scale(name, outputs)
            self._matrix_scale(name, smoother, outputs, largest)

    def _rows(self, owner: str, name: str, tensor: SourceTensor) -> None:
        """A row-parallel layer: whole rows are encoded, each rank keeps its columns."""
        path = f"{owner}.{name}"
        smoother, outputs = self._smoother(tensor), self._outputs(tensor)
        largest = self._largest(tensor)
        whole = SmoothWeight(smoother, self.layout.dtype, outputs, largest)
        self.layout.decisions.setdefault(path, whole.name)
        for rank in self.ranks:
            keep = even(tensor.cols, self.layout.mapping.tp_size, rank.tp)
            cut = keep[1] - keep[0]
            codec = dataclasses.replace(whole, keep=keep)
            matrix = self.layout.builder.matrix(rank.file, self.prefix + path, tensor.rows, cut, codec)
            self.layout.builder.feed(matrix, tensor, 0, tensor.rows)
            value = SmoothValue(smoother, "smoother", "smoother", (1, cut), keep=keep, inputs=tensor.cols)
            self._value(rank, path, value, cut)
        self._act_scale(path, outputs)
        self._matrix_scale(path, smoother, outputs, largest)
        if outputs is not None:
            value = SmoothValue(smoother, "activation", "quantization_scaling_factor", self._number(1))
            for rank in self.ranks:
                self._value(rank, owner, value)

    # ---- small tensors

    def _number(self, *shape: int) -> tuple[int, ...]:
        """Shape of what is measured for a whole layer: Qwen's converter stores it without dimensions."""
        return () if self.layout.family.config_class == "qwen" else shape

    def _norm(self, name: str, norm: SourceTensor, smoother: Smoother) -> None:
        """The weight seen as one row: element c is divided by smoother c."""
        size, builder = norm.shape[0], self.layout.builder
        row = dataclasses.replace(norm, shape=(1, size), pieces=tuple(Extent(p.shard, p.begin, 1, p.rows) for p in norm.pieces))
        codec: Codec = SmoothNorm(smoother, self.layout.dtype)
        for rank in self.ranks:
            builder.feed(builder.matrix(rank.file, self.prefix + name, 1, size, codec), row, 0, 1)
            if self.layout.options.per_token:
                builder.constant(rank.file, f"{self.prefix}{name}.scale_to_int", F32, (1,), _ONE)
            else:
                self._value(rank, name, SmoothValue(smoother, "activation", "scale_to_int", self._number(1)))

    def _act_scale(self, name: str, outputs: float | None) -> None:
        if outputs is not None:
            data = struct.pack("<f", outputs / 127)
            for rank in self.ranks:
                self.layout.builder.constant(rank.file, f"{self.prefix}{name}.act_scale", F32, self._number(1, 1), data)

    def _matrix_scale(self, name: str, smoother: Smoother, outputs: float | None, largest: tuple[tuple[str, str], ...]) -> None:
        """The single weight scale of a matrix."""
        for rank in self.ranks if largest else ():
            value = SmoothValue(smoother, "scale", "per_channel_scale", (1, 1), outputs, largest[0][1])
            self._value(rank, name, value)

    def _value(self, rank: Rank, name: str, value: SmoothValue, cols: int = 1) -> None:
        blank = NoSource(f"{value.suffix} of layer {self.layer} {name}")
        builder = self.layout.builder
        builder.feed(builder.matrix(rank.file, self.prefix + name, 1, cols, value), blank, 0, 1)
