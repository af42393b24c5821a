"""The tensors of a decoder model: which rows and columns of which source make up each module of each rank.

Module names are TensorRT-LLM's: in a dense MLP `fc` is the activated projection (gate_proj) and `gate` the linear one (up_proj).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.rows import SourceTensor
from streamconv.families.base import Family
from streamconv.memory import MIB, check_room
from streamconv.planning.draft import Draft
from streamconv.planning.plan import PLAIN_ROWS, RowOp
from streamconv.quants.base import Codec
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.cache_factors import cache_constants
from streamconv.targets.trtllm.expert_layer import describe_experts
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.parallel import ParallelMapping, Rank, even, kv_heads, padded, stage_layers
from streamconv.targets.trtllm.recipes import Module, Quant

_Rows = tuple[int, int]


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
        self._embedding(self.mapping.stage(0))
        for pp, layers in enumerate(stages):
            for layer in layers:
                check_room(MIB, "planning")
                self._layer(self.mapping.stage(pp), layer, f"transformer.layers.{layer - layers.start}.")
        last = self.mapping.stage(self.mapping.pp_size - 1)
        self._norm(last, "transformer.ln_f", "final_norm", -1, self.model.hidden_size)
        self._lm_head(last)
        for note in dict.fromkeys(self._left_out()):
            self.decisions.setdefault(*note)

    # ---- outside the layers

    def _embedding(self, ranks: list[Rank]) -> None:
        vocab, hidden, tp = self.model.vocab_size, self.model.hidden_size, self.mapping.tp_size
        source = self.roles.require("embedding", (vocab, hidden))
        parallel = self.options.use_parallel_embedding and tp > 1
        name, rows, cols = "transformer.vocab_embedding", vocab, hidden
        place: Callable[[Rank], _Rows] = lambda _: (0, vocab)  # noqa: E731
        columns: Callable[[Rank], _Rows] = lambda _: (0, hidden)  # noqa: E731
        if parallel and self.options.embedding_sharding_dim == 0:
            rows, place = -(-vocab // tp), lambda rank: padded(vocab, tp, rank.tp)
        elif parallel:
            cols, columns = hidden // tp, lambda rank: even(hidden, tp, rank.tp)
        self.each(ranks, name, (rows, cols), self._plain(), source, place, columns)

    def _lm_head(self, ranks: list[Rank]) -> None:
        if self.shared:
            self.roles.ignore_role("lm_head")
            return
        vocab, hidden, tp = self.model.vocab_size, self.model.hidden_size, self.mapping.tp_size
        role = "embedding" if self.tied else "lm_head"
        if self.tied:
            self.roles.ignore_role("lm_head")
        source = self.roles.require(role, (vocab, hidden))
        self.each(ranks, "lm_head", (-(-vocab // tp), hidden), self._plain(), source, lambda rank: padded(vocab, tp, rank.tp))

    def _norm(self, ranks: list[Rank], name: str, role: str, layer: int, size: int) -> None:
        source = self.roles.require(role, (size,), layer)
        codec = self._plain(vector=True, add_one=self.family.norm_add_one)
        self.each(ranks, name, (size, 1), codec, source, lambda _: (0, size))

    # ---- one layer

    def _layer(self, ranks: list[Rank], layer: int, prefix: str) -> None:
        hidden, size = self.model.hidden_size, self.model.head_size
        if self.options.quant == "smoothquant" and self.ranges is not None:
            self._smooth_layer(self.ranges, ranks, layer, prefix)
            return
        self._norm(ranks, prefix + "input_layernorm", "input_norm", layer, hidden)
        self._qkv(ranks, layer, prefix)
        self._row_parallel(ranks, layer, prefix, "attention.dense", "o", self.model.num_attention_heads * size)
        self._full_bias(ranks, layer, prefix + "attention.dense", "o_bias", self._has_dense_bias())
        for side in ("q", "k"):
            if f"{side}_norm" in self.family.tensors:
                self._norm(ranks, f"{prefix}attention.{side}_layernorm", f"{side}_norm", layer, size)
        self._norm(ranks, prefix + "post_layernorm", "post_norm", layer, hidden)
        for role, name in (("pre_ffn_norm", "pre_feedforward"), ("post_ffn_norm", "post_feedforward")):
            if role in self.family.tensors:
                self._norm(ranks, f"{prefix}{name}_layernorm", role, layer, hidden)
        if self.model.num_experts:
            describe_experts(self, ranks, layer, prefix)
        elif self.family.fused_mlp:
            self._fused_mlp(ranks, layer, prefix)
        else:
            self._dense_mlp(ranks, layer, prefix)
        self._add_constants(ranks, layer, prefix)

    def _smooth_layer(self, ranges: Ranges, ranks: list[Rank], layer: int, prefix: str) -> None:
        from streamconv.targets.trtllm.smooth_layer import SmoothLayer

        SmoothLayer(self, ranges, ranks, layer, prefix).describe()
        if self._has_qkv_bias():
            size, heads = self.model.head_size, self.model.num_attention_heads
            each = (heads + 2 * self.kv) // self.mapping.tp_size * size
            vector = self._plain(vector=True, suffix="bias")
            made = [self.builder.matrix(rank.file, prefix + "attention.qkv", each, 1, vector) for rank in ranks]
            self._feed_qkv(ranks, made, layer, 1, "_bias")
        self._full_bias(ranks, layer, prefix + "attention.dense", "o_bias", self._has_dense_bias())
        self._add_constants(ranks, layer, prefix)

    def each(
        self, ranks: list[Rank], name: str, shape: tuple[int, int], codec: Codec, source: SourceTensor | None,
        rows: Callable[[Rank], _Rows], cols: Callable[[Rank], _Rows] | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """A matrix on each rank, made of one block of a source."""
        for rank in ranks:
            matrix = self.builder.matrix(rank.file, name, *shape, codec, note=note)
            self.builder.feed(matrix, source, *rows(rank), cols=None if cols is None else [cols(rank)])

    def _plain(self, *, vector: bool = False, add_one: bool = False, suffix: str = "weight") -> Plain:
        return Plain(self.dtype, add_one, vector, suffix, via_half=self.options.quant == "smoothquant")

    def _add_constants(self, ranks: list[Rank], layer: int, prefix: str) -> None:
        constants = self.quant.constants(layer, self.model.num_hidden_layers, self.options) + cache_constants(self, layer)
        for rank in ranks:
            for name, dtype, shape, data in constants:
                self.builder.constant(rank.file, prefix + name, dtype, shape, data)

    def _has_qkv_bias(self) -> bool:
        return self.family.qkv_bias == "always" or (self.family.qkv_bias == "config" and self.model.attention_bias)

    def _has_dense_bias(self) -> bool:
        return self.family.dense_bias == "config" and self.model.attention_bias

    def _qkv(self, ranks: list[Rank], layer: int, prefix: str) -> None:
        size, heads, tp = self.model.head_size, self.model.num_attention_heads, self.mapping.tp_size
        each = heads // tp + 2 * max(self.kv // tp, 1)
        full = (heads + 2 * max(self.kv, tp)) * size
        codec, note = self.codec("attention.qkv", layer, each * size, self.model.hidden_size, full, None)
        name = prefix + "attention.qkv"
        made = [self.builder.matrix(rank.file, name, each * size, self.model.hidden_size, codec, note=note) for rank in ranks]
        self._feed_qkv(ranks, made, layer, self.model.hidden_size, "")
        if self._has_qkv_bias():
            vector = self._plain(vector=True, suffix="bias")
            made = [self.builder.matrix(rank.file, name, each * size, 1, vector) for rank in ranks]
            self._feed_qkv(ranks, made, layer, 1, "_bias")

    def _feed_qkv(self, ranks: list[Rank], made: list[int], layer: int, cols: int, suffix: str) -> None:
        """Rows of a rank: its query heads, its key heads, its value heads."""
        size, heads, tp = self.model.head_size, self.model.num_attention_heads, self.mapping.tp_size
        wide = 2 if self.options.remove_duplicated_kv_heads else 1
        source_kv = self.kv * wide

        def shape(rows: int) -> tuple[int, ...]:
            return (rows * size, cols) if not suffix else (rows * size,)

        if not suffix and "qkv" in self.family.tensors:
            fused = self.roles.require("qkv", shape(heads + 2 * source_kv), layer)
            starts = {"q": 0, "k": heads * size, "v": (heads + source_kv) * size}
            parts = {role: (fused, start) for role, start in starts.items()}
        elif not suffix and "qkv_grouped" in self.family.tensors:
            self._feed_grouped(ranks, made, self.roles.require("qkv_grouped", shape(heads + 2 * source_kv), layer))
            return
        else:
            counts = {"q": heads, "k": source_kv, "v": source_kv}
            parts = {r: (self.roles.require(r + suffix, shape(n), layer), 0) for r, n in counts.items()}
        for role, (source, base) in parts.items():
            op = RowOp("rope", size) if role != "v" and self.model.source == "meta" else PLAIN_ROWS
            if wide == 2 and role != "q":
                op = RowOp("dedup", 2 * size)
            for rank, matrix in zip(ranks, made, strict=True):
                first, last = even(heads, tp, rank.tp) if role == "q" else kv_heads(self.kv, tp, rank.tp)
                scale = size * (wide if role != "q" else 1)
                self.builder.feed(matrix, source, base + first * scale, base + last * scale, op=op)

    def _feed_grouped(self, ranks: list[Rank], made: list[int], source: SourceTensor | None) -> None:
        """InternLM2: each KV head's group holds its query heads, its key head and its value head."""
        size, tp, kv = self.model.head_size, self.mapping.tp_size, self.kv
        heads = self.model.num_attention_heads
        per = heads // kv
        group = (per + 2) * size
        for rank, matrix in zip(ranks, made, strict=True):
            for head in range(*even(heads, tp, rank.tp)):
                start = head // per * group + head % per * size
                self.builder.feed(matrix, source, start, start + size)
            for place in (per, per + 1):
                for head in range(*kv_heads(kv, tp, rank.tp)):
                    start = head * group + place * size
                    self.builder.feed(matrix, source, start, start + size)

    def _row_parallel(self, ranks: list[Rank], layer: int, prefix: str, name: str, role: str, width: int) -> None:
        hidden, tp = self.model.hidden_size, self.mapping.tp_size
        source = self.roles.require(role, (hidden, width), layer)
        codec, note = self.codec(name, layer, hidden, width // tp, hidden, width)
        shape = hidden, width // tp
        self.each(ranks, prefix + name, shape, codec, source, lambda _: (0, hidden), lambda rank: even(width, tp, rank.tp), note)

    def _column_parallel(self, ranks: list[Rank], layer: int, prefix: str, name: str, role: str) -> None:
        width, hidden, tp = self.model.intermediate_size, self.model.hidden_size, self.mapping.tp_size
        source = self.roles.require(role, (width, hidden), layer)
        codec, note = self.codec(name, layer, width // tp, hidden, width, None)
        self.each(ranks, prefix + name, (width // tp, hidden), codec, source, lambda rank: even(width, tp, rank.tp), note=note)

    def _full_bias(self, ranks: list[Rank], layer: int, name: str, role: str, wanted: bool) -> None:
        """A row-parallel bias is added once after the all-reduce: every rank keeps all of it."""
        if not wanted:
            return
        source = self.roles.require(role, (self.model.hidden_size,), layer)
        for number, rank in enumerate(ranks):
            vector = self._plain(vector=True, suffix="bias")
            matrix = self.builder.matrix(rank.file, name, self.model.hidden_size, 1, vector)
            if number and self.quant.row_bias_once:
                continue  # left zero: the group-wise kernel adds it before the all-reduce
            self.builder.feed(matrix, source, 0, self.model.hidden_size)

    # ---- MLPs

    def _dense_mlp(self, ranks: list[Rank], layer: int, prefix: str) -> None:
        self._column_parallel(ranks, layer, prefix, "mlp.fc", "gate")
        self._column_parallel(ranks, layer, prefix, "mlp.gate", "up")
        self._row_parallel(ranks, layer, prefix, "mlp.proj", "down", self.model.intermediate_size)
        if self.model.mlp_bias:
            width, tp = self.model.intermediate_size, self.mapping.tp_size
            for name, role in (("mlp.fc", "gate_bias"), ("mlp.gate", "up_bias")):
                source = self.roles.require(role, (width,), layer)
                vector = self._plain(vector=True, suffix="bias")
                self.each(ranks, prefix + name, (width // tp, 1), vector, source, lambda rank: even(width, tp, rank.tp))
            self._full_bias(ranks, layer, prefix + "mlp.proj", "down_bias", True)

    def _fused_mlp(self, ranks: list[Rank], layer: int, prefix: str) -> None:
        """Phi-3: gate over up becomes, on each rank, its up rows over its gate rows."""
        width, hidden, tp = self.model.intermediate_size, self.model.hidden_size, self.mapping.tp_size
        source = self.roles.require("gate_up", (2 * width, hidden), layer)
        codec, note = self.codec("mlp.fc", layer, 2 * width // tp, hidden, 2 * width, None)
        for rank in ranks:
            matrix = self.builder.matrix(rank.file, prefix + "mlp.fc", 2 * width // tp, hidden, codec, note=note)
            start, stop = even(width, tp, rank.tp)
            self.builder.feed(matrix, source, width + start, width + stop)
            self.builder.feed(matrix, source, start, stop)
        self._row_parallel(ranks, layer, prefix, "mlp.proj", "down", width)

    # ---- how a matrix is stored

    def codec(
        self,
        name: str,
        layer: int,
        rows: int,
        cols: int,
        full_rows: int,
        full_cols: int | None,
        experts: int = 0,
        tp: int | None = None,
    ) -> tuple[Codec, str]:
        module = Module(
            name,
            layer,
            self.model.num_hidden_layers,
            rows,
            cols,
            full_rows,
            cols if full_cols is None else full_cols,
            experts,
            tp or self.mapping.tp_size,
        )
        problem = self.quant.problems(module, self.options, self.dtype)
        codec = None if problem else self.quant.codec(module, self.options, self.dtype)
        if problem and problem not in self.refused:
            self.refused.append(problem)
        if codec is None:
            note = self.quant.reason(module, self.options)
            self.decisions.setdefault(name, f"{self.dtype.name}: {note}")
            return self._plain(), note
        self.decisions.setdefault(name, codec.name)
        return codec, ""

    def _left_out(self) -> list[tuple[str, str]]:
        kind = self.dtype.name
        lines = [("vocab_embedding", f"{kind}: embeddings are never quantized")]
        if self.shared:
            lines.append(("lm_head", "not written: shared with the embedding"))
        else:
            lines.append(("lm_head", f"{kind}: the output projection is never quantized"))
        smooth = self.options.quant == "smoothquant"
        lines.append(("norms and biases", f"{kind}: " + ("layer norms divided by the smoother" if smooth else "never quantized")))
        if self.model.num_experts:
            lines.append(("mlp.router", "F32: routers are never quantized and always float32"))
        return lines
