"""Decoder layers under SmoothQuant: which weights share a smoother, and the tensors that come with it.

Maxima are taken over whole matrices, so the integers and scales do not depend on the tensor parallel split.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.rows import Extent, NoSource, SourceTensor
from streamconv.quants.smoothing import InputChannelAmax, Smoother
from streamconv.quants.smoothquant import HALF, SmoothNorm, SmoothValue, SmoothWeight
from streamconv.targets.trtllm.parallel import Rank, even
from streamconv.targets.trtllm.rank_layout import Part, Place, RankLayout, whole

_ONE = struct.pack("<f", 1.0)


def _module(tensor: SourceTensor) -> str:
    """ "model.layers.0.mlp.up_proj" of its weight."""
    return tensor.name.removesuffix(".weight")


def _columns(tensor: SourceTensor) -> str:
    """Key of its column maxima."""
    return f"columns of {tensor.name}"


@dataclass(slots=True)
class SmoothLayout(RankLayout):
    """Describes a SmoothQuant checkpoint to a Draft; `ranges` are there."""

    def layer(self, at: Place) -> None:
        hidden, width, size = self.model.hidden_size, self.model.intermediate_size, self.model.head_size
        q_rows, kv_rows = self.model.num_attention_heads * size, self.kv * size
        shapes: dict[str, tuple[int, ...]] = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows)}
        shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        shapes |= {"input_norm": (hidden,), "post_norm": (hidden,)}
        names = {role: self.roles.require(role, shape, at.layer) for role, shape in shapes.items()}
        tensors = {role: tensor for role, tensor in names.items() if tensor is not None}
        if len(tensors) == len(shapes):  # `roles` reports what is missing
            self._smooth(at, tensors)
        self.qkv_bias(at)
        self.dense_bias(at)
        self.add_constants(at)

    def _smooth(self, at: Place, tensors: dict[str, SourceTensor]) -> None:
        weights = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
        assert self.ranges is not None
        self.ranges.check({f"{_module(w)}.{side}": size for w in weights for side, size in (("x", w.cols), ("y", w.rows))})
        qkv, gates = [tensors[role] for role in ("q", "k", "v")], [tensors[role] for role in ("gate", "up")]
        smoother = self._smoother(*qkv)
        self._divided_norm(at, "input_layernorm", tensors["input_norm"], smoother)
        self._weight(at, "attention.qkv", smoother, *qkv)
        self._row_weight(at, "attention.dense", tensors["o"])
        smoother = self._smoother(*gates)
        self._divided_norm(at, "post_layernorm", tensors["post_norm"], smoother)
        for name, tensor in zip(("mlp.fc", "mlp.gate"), gates, strict=True):
            self._weight(at, name, smoother, tensor)
        self._row_weight(at, "mlp.proj", tensors["down"])

    def _smoother(self, *weights: SourceTensor) -> Smoother:
        assert self.ranges is not None
        for tensor in weights:
            self.builder.reduce(tensor, InputChannelAmax(_columns(tensor)))
        names, keys = " and ".join(tensor.name for tensor in weights), tuple(map(_columns, weights))
        return Smoother(keys, names, self.ranges, _module(weights[0]), self.options.smoothquant, self.options.target_version != "0.16")

    def _smoothed(self, name: str, smoother: Smoother, *weights: SourceTensor) -> SmoothWeight:
        assert self.ranges is not None
        outputs = None if self.options.per_token else self.ranges.amax([f"{_module(tensor)}.y" for tensor in weights])
        largest = () if self.options.per_channel else tuple((tensor.name, _columns(tensor)) for tensor in weights)
        codec = SmoothWeight(smoother, self.dtype, outputs, largest)
        if name == "attention.qkv":
            codec = dataclasses.replace(codec, dtype=HALF, divide=self.kv != self.model.num_attention_heads, single=False)
        self.decisions.setdefault(name, codec.name)
        return codec

    def _weight(self, at: Place, name: str, smoother: Smoother, *weights: SourceTensor) -> None:
        codec = self._smoothed(name, smoother, *weights)
        self.matrix(at, name, [Part(tensor, self.even(tensor.rows)) for tensor in weights], whole(weights[0].cols), codec)
        self._scales(at, name, codec)

    def _row_weight(self, at: Place, name: str, tensor: SourceTensor) -> None:
        """A row-parallel layer: whole rows are encoded, each rank keeps its columns."""
        smoother = self._smoother(tensor)
        codec = self._smoothed(name, smoother, tensor)
        for rank in at.ranks:
            keep = even(tensor.cols, self.mapping.tp_size, rank.tp)
            cut = keep[1] - keep[0]
            matrix = self.builder.matrix(rank.file, at.prefix + name, tensor.rows, cut, dataclasses.replace(codec, keep=keep))
            self.builder.feed(matrix, tensor, 0, tensor.rows)
            self._value(at, rank, name, SmoothValue(smoother, "smoother", "smoother", (1, cut), keep=keep, inputs=tensor.cols), cut)
        self._scales(at, name, codec)
        for rank in at.ranks if codec.outputs is not None else ():
            value = SmoothValue(smoother, "activation", "quantization_scaling_factor", self._number(1))
            self._value(at, rank, name.partition(".")[0], value)

    def _divided_norm(self, at: Place, name: str, norm: SourceTensor, smoother: Smoother) -> None:
        """The weight seen as one row: element c is divided by smoother c."""
        size = norm.shape[0]
        row = dataclasses.replace(norm, shape=(1, size), pieces=tuple(Extent(p.shard, p.begin, 1, p.rows) for p in norm.pieces))
        for rank in at.ranks:
            self.builder.feed(self.builder.matrix(rank.file, at.prefix + name, 1, size, SmoothNorm(smoother, self.dtype)), row, 0, 1)
            if self.options.per_token:
                self.builder.constant(rank.file, f"{at.prefix}{name}.scale_to_int", F32, (1,), _ONE)
            else:
                self._value(at, rank, name, SmoothValue(smoother, "activation", "scale_to_int", self._number(1)))

    # ---- small tensors

    def _number(self, *shape: int) -> tuple[int, ...]:
        """Shape of what is measured for a whole layer: Qwen's converter stores it without dimensions."""
        return () if self.family.config_class == "qwen" else shape

    def _scales(self, at: Place, name: str, codec: SmoothWeight) -> None:
        """The scale of the outputs, and that of a weight with a single one; qkv has one for each row."""
        for rank in at.ranks:
            if codec.outputs is not None:
                data = struct.pack("<f", codec.outputs / 127)
                self.builder.constant(rank.file, f"{at.prefix}{name}.act_scale", F32, self._number(1, 1), data)
            if codec.largest and name != "attention.qkv":
                key = codec.largest[0][1]
                self._value(at, rank, name, SmoothValue(codec.smoother, "scale", "per_channel_scale", (1, 1), codec.outputs, key))

    def _value(self, at: Place, rank: Rank, name: str, value: SmoothValue, cols: int = 1) -> None:
        source = NoSource(f"{value.suffix} of layer {at.layer} {name}")
        self.builder.feed(self.builder.matrix(rank.file, at.prefix + name, 1, cols, value), source, 0, 1)
