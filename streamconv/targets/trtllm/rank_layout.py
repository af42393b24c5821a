"""The tensors of a decoder model: which rows and columns of which source make up each module of each rank.

Module names are TensorRT-LLM's: in a dense MLP `fc` is the activated projection (gate_proj) and `gate` the linear one (up_proj).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F32, DType
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.rows import SourceTensor
from streamconv.errors import RefusedError
from streamconv.families.base import Family
from streamconv.memory import MIB, check_room
from streamconv.planning.draft import Draft
from streamconv.planning.plan import PLAIN_ROWS, RowOp
from streamconv.quants.base import Codec
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.cache_factors import cache_constants
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.parallel import ParallelMapping, Rank, even, kv_heads, padded, stage_layers
from streamconv.targets.trtllm.recipes import Module, Quant

Cut = Callable[[Rank], list[tuple[int, int]]]
"""What a rank takes: ranges [first, last)."""
_NORMS = {
    "q_norm": "attention.q_layernorm",
    "k_norm": "attention.k_layernorm",
    "post_norm": "post_layernorm",
    "pre_ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
"""Role -> module, of the norms after attention's input; a family has some."""


class Place(NamedTuple):
    """The ranks of a pipeline stage, and a layer of the model there; the names of its modules begin with `prefix`."""

    ranks: list[Rank]
    layer: int = -1
    prefix: str = ""


class Part(NamedTuple):
    """Rows of a source: `cut` counts units of so many rows, from row `base` on."""

    source: SourceTensor | None
    cut: Cut
    unit: int = 1
    base: int = 0
    op: RowOp = PLAIN_ROWS

    def rows(self, rank: Rank) -> list[tuple[int, int]]:
        return [(self.base + first * self.unit, self.base + last * self.unit) for first, last in self.cut(rank)]


def whole(size: int) -> Cut:
    """All of it, on every rank."""
    return lambda _: [(0, size)]


def _count(parts: Sequence[Part], rank: Rank) -> int:
    """Rows of a matrix that these make up."""
    return sum(part.op.out_rows(last - first) for part in parts for first, last in part.rows(rank))


@dataclass(slots=True)
class RankLayout:
    """Describes one checkpoint to a Draft.

    Attributes:
        kv: KV heads written (after removing duplicates).
        shared: lm_head is left out, the embedding serves.
        tied: lm_head is made from the embedding.
        ranges: what a calibration run measured, where a format needs it.
        kv_scales: layer -> scale of its FP8 KV cache, where the source has it.
        cache_factors: layer -> float32 factor of its quantized KV cache, where the source is a checkpoint that has it.
    """

    model: ModelConfig
    family: Family
    options: TensorRTLLM
    dtype: DType
    mapping: ParallelMapping
    roles: TensorLookup
    quant: Quant
    builder: Draft
    kv: int
    shared: bool
    tied: bool
    ranges: Ranges | None = None
    kv_scales: Mapping[int, float] = field(default_factory=dict)
    cache_factors: Mapping[int, bytes] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)

    def describe(self) -> None:
        stages = stage_layers(self.model.num_hidden_layers, self.mapping.pp_size, self.options.target_version)
        self._embedding(Place(self.mapping.stage(0)))
        for pp, layers in enumerate(stages):
            for layer in layers:
                check_room(MIB, "planning")
                self.layer(Place(self.mapping.stage(pp), layer, f"transformer.layers.{layer - layers.start}."))
        last = Place(self.mapping.stage(self.mapping.pp_size - 1))
        self._norm(last, "transformer.ln_f", "final_norm", self.model.hidden_size)
        self._lm_head(last)
        for note in dict.fromkeys(self._left_out()):
            self.decisions.setdefault(*note)

    def layer(self, at: Place) -> None:
        hidden, size = self.model.hidden_size, self.model.head_size
        self._norm(at, "input_layernorm", "input_norm", hidden)
        self._linear(at, "attention.qkv", self._qkv(at.layer), hidden)
        self.qkv_bias(at)
        self._row_parallel(at, "attention.dense", "o", self.model.num_attention_heads * size)
        self.dense_bias(at)
        for role, name in _NORMS.items():
            if role in self.family.tensors:
                self._norm(at, name, role, size if name.startswith("attention") else hidden)
        if self.model.num_experts:
            self._experts(at)
        else:
            self._mlp(at)
        self.add_constants(at)

    # ---- how a matrix is made

    def matrix(self, at: Place, name: str, parts: Sequence[Part], cols: Cut, codec: Codec, note: str = "") -> None:
        """A matrix on each rank, made of rows of sources one above the other."""
        ((left, right),) = cols(at.ranks[0])
        matrices = self._matrices(at, name, _count(parts, at.ranks[0]), right - left, codec, note)
        for part in parts:
            for rank, matrix in matrices.items():
                for start, stop in part.rows(rank):
                    self.builder.feed(matrix, part.source, start, stop, cols=cols(rank), op=part.op)

    def _matrices(self, at: Place, name: str, rows: int, cols: int, codec: Codec, note: str, experts: int = 0) -> dict[Rank, int]:
        name = at.prefix + name
        return {rank: self.builder.matrix(rank.file, name, rows, cols, codec, experts=experts, note=note) for rank in at.ranks}

    def _linear(self, at: Place, name: str, parts: Sequence[Part], width: int, row_parallel: bool = False) -> None:
        """A linear layer with `width` inputs, of which a rank has a part if it is row-parallel, and else a part of the outputs."""
        tp, rows = self.mapping.tp_size, _count(parts, at.ranks[0])
        sizes = (width // tp, rows, width) if row_parallel else (width, rows * tp, width)
        codec, note = self._codec(name, at.layer, rows, *sizes)
        self.matrix(at, name, parts, self.even(width) if row_parallel else whole(width), codec, note)

    def _row_parallel(self, at: Place, name: str, role: str, width: int) -> None:
        hidden = self.model.hidden_size
        self._linear(at, name, [Part(self.roles.require(role, (hidden, width), at.layer), whole(hidden))], width, row_parallel=True)

    def _norm(self, at: Place, name: str, role: str, size: int) -> None:
        codec = self.plain(vector=True, add_one=self.family.norm_add_one)
        self.matrix(at, name, [Part(self.roles.require(role, (size,), at.layer), whole(size))], whole(1), codec)

    def _bias(self, at: Place, name: str, parts: Sequence[Part]) -> None:
        self.matrix(at, name, parts, whole(1), self.plain(vector=True, suffix="bias"))

    def _full_bias(self, at: Place, name: str, role: str) -> None:
        """A row-parallel bias is added once after the all-reduce: every rank keeps all of it.

        The group-wise kernel adds it before the all-reduce: ranks other than the first hold zeros.
        """
        hidden, once = self.model.hidden_size, self.quant.row_bias_once
        source = self.roles.require(role, (hidden,), at.layer)
        self._bias(at, name, [Part(source, lambda rank: [(0, 0 if rank.tp and once else hidden)])])

    def even(self, size: int) -> Cut:
        """An equal part on every tensor parallel rank."""
        return lambda rank: [even(size, self.mapping.tp_size, rank.tp)]

    def plain(self, *, vector: bool = False, add_one: bool = False, suffix: str = "weight") -> Plain:
        return Plain(self.dtype, add_one, vector, suffix, via_half=self.options.quant == "smoothquant")

    def _codec(
        self, name: str, layer: int, rows: int, cols: int, full_rows: int, full_cols: int, experts: int = 0, tp: int | None = None
    ) -> tuple[Codec, str]:
        """How a linear layer is stored, and why if it is not quantized."""
        layers, tp = self.model.num_hidden_layers, tp or self.mapping.tp_size
        module = Module(name, layer, layers, rows, cols, full_rows, full_cols, experts, tp)
        try:
            codec = self.quant.codec(module, self.options, self.dtype)
        except RefusedError as error:
            self.refused += [problem for problem in error.problems if problem not in self.refused]
            return self.plain(), ""
        note = codec if isinstance(codec, str) else ""
        self.decisions.setdefault(name, f"{self.dtype.name}: {note}" if isinstance(codec, str) else codec.name)
        return self.plain() if isinstance(codec, str) else codec, note

    # ---- outside the layers

    def _embedding(self, at: Place) -> None:
        vocab, hidden = self.model.vocab_size, self.model.hidden_size
        rows, cols = whole(vocab), whole(hidden)
        if self.options.use_parallel_embedding and self.options.embedding_sharding_dim == 0:
            rows = self._padded(vocab)
        elif self.options.use_parallel_embedding:
            cols = self.even(hidden)
        source = self.roles.require("embedding", (vocab, hidden))
        self.matrix(at, "transformer.vocab_embedding", [Part(source, rows)], cols, self.plain())

    def _lm_head(self, at: Place) -> None:
        if self.shared or self.tied:
            self.roles.ignore_role("lm_head")
        if not self.shared:
            vocab, hidden = self.model.vocab_size, self.model.hidden_size
            source = self.roles.require("embedding" if self.tied else "lm_head", (vocab, hidden))
            self.matrix(at, "lm_head", [Part(source, self._padded(vocab))], whole(hidden), self.plain())

    def _padded(self, size: int) -> Cut:
        return lambda rank: [padded(size, self.mapping.tp_size, rank.tp)]

    # ---- attention

    def qkv_bias(self, at: Place) -> None:
        if self.family.has_bias("q_bias", self.model.attention_bias):
            self._bias(at, "attention.qkv", self._qkv(at.layer, "_bias"))

    def dense_bias(self, at: Place) -> None:
        if self.family.has_bias("o_bias", self.model.attention_bias):
            self._full_bias(at, "attention.dense", "o_bias")

    def _qkv(self, layer: int, suffix: str = "") -> list[Part]:
        """Rows of a rank: its query heads, its key heads, its value heads."""
        size, heads = self.model.head_size, self.model.num_attention_heads
        wide = 2 if self.options.remove_duplicated_kv_heads else 1
        counts = {"q": heads, "k": self.kv * wide, "v": self.kv * wide}

        def tensor(role: str, count: int) -> SourceTensor | None:
            return self.roles.require(role + suffix, (count * size,) if suffix else (count * size, self.model.hidden_size), layer)

        stored = next((role for role in ("qkv", "qkv_grouped") if role in self.family.tensors and not suffix), None)
        together = tensor(stored, sum(counts.values())) if stored else None
        if stored == "qkv_grouped":
            return self._grouped(together)
        parts, base = list[Part](), 0
        for role, count in counts.items():
            source, own = together if stored else tensor(role, count), role == "q"
            op = RowOp("rope", size) if role != "v" and self.model.source == "meta" else PLAIN_ROWS
            op = RowOp("dedup", 2 * size) if wide == 2 and not own else op
            cut = self.even(heads) if own else self._kv_heads
            parts.append(Part(source, cut, size if own else size * wide, base, op))
            base += count * size if stored else 0
        return parts

    def _kv_heads(self, rank: Rank) -> list[tuple[int, int]]:
        return [kv_heads(self.kv, self.mapping.tp_size, rank.tp)]

    def _grouped(self, source: SourceTensor | None) -> list[Part]:
        """InternLM2: each KV head's group holds its query heads, its key head and its value head."""
        per = self.model.num_attention_heads // self.kv
        queries = self.even(self.model.num_attention_heads)

        def cut(rank: Rank) -> list[tuple[int, int]]:
            heads = [head // per * (per + 2) + head % per for head in range(*queries(rank)[0])]
            heads += [head * (per + 2) + place for place in (per, per + 1) for head in range(*self._kv_heads(rank)[0])]
            return [(head, head + 1) for head in heads]

        return [Part(source, cut, self.model.head_size)]

    # ---- MLPs

    def _mlp(self, at: Place) -> None:
        """Phi-3's gate over up becomes, on each rank, its up rows over its gate rows."""
        width, hidden = self.model.intermediate_size, self.model.hidden_size
        roles, cut = {"mlp.fc": "gate", "mlp.gate": "up"}, self.even(width)
        if "gate_up" in self.family.tensors:
            source = self.roles.require("gate_up", (2 * width, hidden), at.layer)
            self._linear(at, "mlp.fc", [Part(source, cut, base=width), Part(source, cut)], hidden)
        else:
            for name, role in roles.items():
                self._linear(at, name, [Part(self.roles.require(role, (width, hidden), at.layer), cut)], hidden)
        self._row_parallel(at, "mlp.proj", "down", width)
        if self.model.mlp_bias and "gate_up" not in self.family.tensors:
            for name, role in roles.items():
                self._bias(at, name, [Part(self.roles.require(role + "_bias", (width,), at.layer), cut)])
            self._full_bias(at, "mlp.proj", "down_bias")

    def _experts(self, at: Place) -> None:
        """Whole experts for moe_ep, ascending, rows and columns of each for moe_tp: in each, a rank's up rows over its gate rows."""
        model, roles, layer, hidden, tp = self.model, self.roles, at.layer, self.model.hidden_size, self.mapping.moe_tp_size
        total, width = model.num_experts, model.moe_intermediate_size or model.intermediate_size
        local = total // self.mapping.moe_ep_size
        router = Part(roles.require("router", (total, hidden), layer), whole(total))
        self.matrix(at, "mlp.router", [router], whole(hidden), Plain(F32))
        fc = self._codec("mlp.fc", layer, 2 * width // tp, hidden, 2 * width, hidden, local, tp)
        proj = self._codec("mlp.proj", layer, hidden, width // tp, hidden, width, local, tp)
        fcs = self._matrices(at, "mlp.fc", 2 * width // tp, hidden, *fc, local)
        projs = self._matrices(at, "mlp.proj", hidden, width // tp, *proj, local)
        members = [(rank.moe_ep, fcs[rank], projs[rank], even(width, tp, rank.moe_tp)) for rank in at.ranks]
        stacked, feed = roles.has("experts_gate_up", layer), self.builder.feed
        if stacked:
            gate = up = roles.require("experts_gate_up", (total, 2 * width, hidden), layer)
            down = roles.require("experts_down", (total, hidden, width), layer)
        for expert in range(total):
            if not stacked:
                up, gate = (roles.require(f"expert_{role}", (width, hidden), layer, expert) for role in ("up", "gate"))
                down = roles.require("expert_down", (hidden, width), layer, expert)
            at_gate, at_up, at_down = (2 * expert * width, (2 * expert + 1) * width, expert * hidden) if stacked else (0, 0, 0)
            for ep, fc_matrix, proj_matrix, (first, last) in members:
                if ep == expert // local:
                    feed(fc_matrix, up, at_up + first, at_up + last)
                    feed(fc_matrix, gate, at_gate + first, at_gate + last)
                    feed(proj_matrix, down, at_down, at_down + hidden, cols=[(first, last)])

    # ---- beside the matrices

    def add_constants(self, at: Place) -> None:
        """What no weight of a layer decides."""
        constants = self.quant.constants(at.layer, self.model.num_hidden_layers, self.options) + cache_constants(self, at.layer)
        for rank in at.ranks:
            for name, dtype, shape, data in constants:
                self.builder.constant(rank.file, at.prefix + name, dtype, shape, data)

    def _left_out(self) -> list[tuple[str, str]]:
        kind = self.dtype.name
        head = "not written: shared with the embedding" if self.shared else f"{kind}: the output projection is never quantized"
        smooth = self.options.quant == "smoothquant"
        lines = [("vocab_embedding", f"{kind}: embeddings are never quantized"), ("lm_head", head)]
        lines.append(("norms and biases", f"{kind}: " + ("layer norms divided by the smoother" if smooth else "never quantized")))
        if self.model.num_experts:
            lines.append(("mlp.router", "F32: routers are never quantized and always float32"))
        return lines
