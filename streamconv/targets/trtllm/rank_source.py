"""A TensorRT-LLM checkpoint as a source: rank files seen as the Hugging Face tensors that they were cut from.

The layout that writes a rank reads it, too: it describes the same checkpoint from tensors that are not there, and what it would have
read from each of them, and where it would have put it, says where each of them lies in the rank files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from streamconv.checkpoint.dtypes import MODEL_DTYPES, DType
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.json_file import read_json
from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.checkpoint.model_config import from_hf, is_tied
from streamconv.checkpoint.rows import Piece, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.shifted_rows import less_one
from streamconv.checkpoint.tensor_table import TensorTable
from streamconv.errors import CheckpointError, RefusedError, TensorError, VerifyError, printable
from streamconv.families import family_of
from streamconv.families.matching import example
from streamconv.planning.draft import Draft
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.plan import Matrix
from streamconv.planning.span_table import SpanTable
from streamconv.quants.plain import Plain
from streamconv.run import manifest
from streamconv.targets import target_from_json
from streamconv.targets.trtllm import expected
from streamconv.targets.trtllm.config_sections import resolve_moe
from streamconv.targets.trtllm.inherited import Origin
from streamconv.targets.trtllm.lookup import Roles
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.parallel import Mapping as Grid
from streamconv.targets.trtllm.parallel import stage_layers
from streamconv.targets.trtllm.rank_layout import Decoder
from streamconv.targets.trtllm.recipes import quant_of
from streamconv.targets.trtllm.source_config import model_config
from streamconv.targets.trtllm.stated import options_of

_CONFIG = "config.json"
_READ = ("none", "int8", "int4", "fp8_rowwise")
"""Values of --quant whose weights are read back."""


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder holds rank files; config.json decides whether they can be read."""
    return os.path.lexists(folder / "rank0.safetensors") and os.path.lexists(folder / _CONFIG)


def open_ranks(folder: Path) -> Index:
    """Open a TensorRT-LLM checkpoint under the names and with the config of the Hugging Face model. No weight is read but a few rows.

    Raises:
        CheckpointError: a rank is missing, or config.json does not describe the files.
        RefusedError: its weights are stored in a way that is not read.
    """
    config = read_json(folder / _CONFIG, MAX_CONFIG)
    try:
        count = expected.rank_count(config)
        shards = tuple(Shard(folder / f"rank{number}.safetensors") for number in range(count))
        headers = [shard.header() for shard in shards]
        held = {shard.path.name: _shapes(header) for shard, header in zip(shards, headers, strict=True)}
        problems, _ = expected.check(config, held)
        if problems:
            raise TensorError([f"{printable(str(folder))}: {problem}" for problem in problems])
        told = _manifest(folder, config)
        options = _options(told, config, headers[0])
    except VerifyError as error:
        raise CheckpointError(f"{printable(str(folder))}: {error.message}") from None
    if options.quant not in _READ:
        told_by = f"{printable(str(folder / _CONFIG))}: quant_algo {config['quantization']['quant_algo']}"
        raise RefusedError([f"{told_by}: the weights of this format are not read back"], hint="start from the model that it was made from")
    source = None if told is None else told.source_config
    return _Reader(folder, config, shards, headers, options, source).index()


def _shapes(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {entry.name: (entry.dtype.name, entry.shape) for entry in header.tensors.values()}


def _manifest(folder: Path, config: Mapping[str, Any]) -> manifest.Manifest | None:
    """The manifest, where it is of this config.json."""
    import xxhash

    if not os.path.lexists(folder / manifest.NAME):
        return None
    told = manifest.read_head(folder / manifest.NAME)
    with Shard(folder / _CONFIG) as file, file.window(0, file.size) as data:
        same = xxhash.xxh3_128(data).hexdigest() == told.config
    return told if same and told.target == TensorRTLLM.key else None


def _options(told: manifest.Manifest | None, config: Mapping[str, Any], header: Header) -> TensorRTLLM:
    if told is not None:
        made = target_from_json(told.target, told.asked)
        assert isinstance(made, TensorRTLLM)
        return made
    return options_of(config, header.tensors)[0]


class _Block(NamedTuple):
    """Rows [start, stop) and columns [left, right) of a tensor are those from `row` on of a matrix.

    Attributes:
        twice: rows of a head that is stored once for two equal ones; 0 for none.
    """

    start: int
    stop: int
    left: int
    right: int
    matrix: int
    row: int
    twice: int


@dataclass(slots=True)
class _Imagined(Roles):
    """Every tensor that the layout asks for, there or not.

    Attributes:
        dtype: of what is not said otherwise.
        asked: the tensors, in the order in which they were asked for.
        head: an output projection is stored.
    """

    dtype: DType = MODEL_DTYPES["float16"]
    asked: dict[str, SourceTensor] = field(default_factory=dict)

    def has(self, role: str, layer: int = -1, expert: int = -1) -> bool:
        return not role.startswith("experts_") and role in self.family.tensors

    def need(self, role: str, shape: tuple[int, ...], layer: int = -1, expert: int = -1) -> SourceTensor | None:
        name = example(self.family, role, layer, expert)
        rows, cols = (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])
        return self.asked.setdefault(name, SourceTensor(name, self.dtype, shape, (Piece(0, 0, rows, cols),)))


class _Reader:
    """Turns a layout round.

    Args:
        source: the source's config.json, where it is known.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        shards: tuple[Shard, ...],
        headers: Sequence[Header],
        options: TensorRTLLM,
        source: Mapping[str, Any] | None,
    ) -> None:
        self._folder, self._shards, self._headers, self._options = folder, shards, headers, options
        self._config, self._recorded = model_config(config, source), source is not None
        self._model = from_hf(self._config)
        self._family = family_of(self._model.architecture)
        self._dtype = MODEL_DTYPES[str(config["dtype"])]
        self._notes = () if source is not None else ("the model's own config.json is not recorded: it is worked out from the checkpoint's",)

    def index(self) -> Index:
        """The checkpoint as a source."""
        roles, matrices, spans = self._layout()
        views = self._views(roles, matrices, spans)
        self._leave_tied_head(views)
        tensors = TensorTable()
        for name, view in views.items():
            tensors.add(name, view.dtype, view.shape, view.pieces[0].shard, view.pieces[0].begin)
        origin = Origin(self._options, self._cache_factors())
        return Index(self._folder, self._config, self._shards, tensors, notes=self._notes, views=views, origin=origin)

    def _cache_factors(self) -> dict[int, bytes]:
        """Layer -> factor of its KV cache."""
        options, factors = self._options, dict[int, bytes]()
        if options.kv_cache is None:
            return factors
        stages = stage_layers(self._model.num_hidden_layers, options.pp_size, options.target_version)
        for stage, layers in enumerate(stages):
            file = stage * options.tp_size
            for number, layer in enumerate(layers):
                entry = self._headers[file].tensors[f"transformer.layers.{number}.attention.kv_cache_scaling_factor"]
                with self._shards[file].window(entry.begin, entry.end) as data:
                    factors[layer] = bytes(data)
        return factors

    def _layout(self) -> tuple[_Imagined, MatrixTable, SpanTable]:
        """What the layout would have read and where it would have put it, at the places where the files have it."""
        options, model, family = self._options, self._model, self._family
        roles = _Imagined(family, {}, dtype=self._dtype)
        grid = Grid(options.tp_size, options.pp_size, *resolve_moe(options))
        draft = Draft(_Nothing())
        for shard in self._shards:
            draft.file(shard.path.name)
        kv = model.num_key_value_heads // (2 if options.remove_duplicated_kv_heads else 1)
        shared = "lm_head.weight" not in self._headers[-1].tensors
        quant = quant_of(options.quant)
        decoder = Decoder(model, family, options, self._dtype, grid, roles, quant, draft, kv, shared, False)
        decoder.describe()
        if decoder.refused:
            raise RefusedError(decoder.refused)
        _, matrices, spans, _ = draft.finish()
        return roles, matrices.moved(self._begin), spans

    def _begin(self, file: int, tensor: str) -> int:
        entry = self._headers[file].tensors.get(tensor)
        if entry is None:
            name = printable(str(self._shards[file].path))
            raise TensorError(f"{name}: missing tensor {tensor}", hint="streamconv verify says what else is wrong")
        return entry.begin

    def _views(self, roles: _Imagined, matrices: MatrixTable, spans: SpanTable) -> dict[str, SourceTensor]:
        blocks: dict[str, list[_Block]] = {name: [] for name in roles.asked}
        for span in spans:
            for dest in span.dests:
                left, right = dest.cols[0]
                twice = span.op.block // 2 if span.op.kind == "dedup" else 0
                blocks[span.source.name].append(_Block(span.start, span.stop, left, right, dest.matrix, dest.row, twice))
        return {name: self._view(tensor, blocks[name], matrices) for name, tensor in roles.asked.items()}

    def _view(self, tensor: SourceTensor, blocks: list[_Block], matrices: MatrixTable) -> SourceTensor:
        """A tensor as blocks one above the other, or side by side; of equal ones on several ranks the first is taken."""
        first = matrices[blocks[0].matrix]
        if not isinstance(first.encoding, Plain):
            raise RefusedError([f"{printable(tensor.name)} is stored as {first.encoding.name}, which is not read back so far"])
        axis = int(any(block.right - block.left < tensor.cols for block in blocks))
        at, pieces = 0, list[Piece]()
        for block in sorted(blocks, key=lambda block: (block.left if axis else block.start, block.matrix)):
            begin, end = (block.left, block.right) if axis else (block.start, block.stop)
            if begin == at:
                pieces += _pieces(block, matrices[block.matrix])
                at = end
        if at != (tensor.cols if axis else tensor.rows):
            raise AssertionError(f"{tensor.name}: the ranks hold {at} of it")
        found = SourceTensor(tensor.name, first.encoding.dtype, tensor.shape, tuple(pieces), axis)
        return less_one(found) if first.encoding.add_one else found

    def _leave_tied_head(self, views: dict[str, SourceTensor]) -> None:
        """A stored output projection that is the embedding is not one of the model's own tensors."""
        names = [example(self._family, role, -1, -1) for role in ("embedding", "lm_head")]
        tied = is_tied(self._config)
        if names[1] in views:
            unknown = not self._recorded and "tie_word_embeddings" not in self._config
            if not (tied or unknown) or not self._same_rows(*(views[name] for name in names)):
                return
            del views[names[1]]
        if not tied:
            self._config["tie_word_embeddings"] = True

    def _same_rows(self, first: SourceTensor, second: SourceTensor) -> bool:
        """Whether rows spread over both are equal."""
        import numpy as np

        held = np.empty((2, first.stored_row_bytes), np.uint8)
        for row in {number * (first.rows - 1) // 15 for number in range(16)}:
            for tensor, out in zip((first, second), held, strict=True):
                tensor.read(self._shards, row, row + 1, out, out[:0])
            if not bool((held[0] == held[1]).all()):
                return False
        return True


def _pieces(block: _Block, matrix: Matrix) -> list[Piece]:
    """Where the rows of a block lie; a head that is stored once stands there twice."""
    place, cols, size = matrix.places[0], block.right - block.left, block.twice
    begin = place.offset + block.row * place.record_bytes
    if not size:
        return [Piece(matrix.file, begin, block.stop - block.start, cols)]
    heads = range((block.stop - block.start) // (2 * size))
    return [Piece(matrix.file, begin + head * size * place.record_bytes, size, cols) for head in heads for _ in range(2)]


class _Nothing:
    """A source without tensors: what the layout reads is not there."""

    def place(self, name: str) -> int | None:
        return None

    def at(self, place: int) -> SourceTensor:
        raise AssertionError(place)

    def kind(self, place: int) -> tuple[DType, int]:
        raise AssertionError(place)

    def row_bytes(self, place: int) -> int:
        raise AssertionError(place)

    def __len__(self) -> int:
        return 0
