"""A TensorRT-LLM checkpoint as a source: rank files seen as the Hugging Face tensors that they were cut from.

The layout that writes a rank reads it, too: it describes the same checkpoint from tensors that are not there, and what it would have
read from each of them, and where it would have put it, says where each of them lies in the rank files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from streamconv.checkpoint.dtypes import MODEL_DTYPES
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.checkpoint.model_config import from_hf, is_tied
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.checkpoint.tensor_table import TensorTable
from streamconv.checkpoint.untrusted import read_json
from streamconv.errors import CheckpointError, RefusedError, TensorError, UsageError, VerifyError, printable
from streamconv.families import family_of
from streamconv.families.matching import example
from streamconv.lazy import np
from streamconv.planning.draft import Draft
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.span_table import SpanTable
from streamconv.quants.fp8_tensor import Scales
from streamconv.quants.layout import LaidOut
from streamconv.run import manifest
from streamconv.targets import target_from_json
from streamconv.targets.trtllm import expected, rank_peers
from streamconv.targets.trtllm.config_sections import resolve_moe
from streamconv.targets.trtllm.inherited import Origin
from streamconv.targets.trtllm.lookup import MODULES
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.parallel import ParallelMapping, stage_layers
from streamconv.targets.trtllm.rank_layout import RankLayout
from streamconv.targets.trtllm.rank_peers import RankFile
from streamconv.targets.trtllm.rank_views import Imagined, views_of
from streamconv.targets.trtllm.recipes import quant_of
from streamconv.targets.trtllm.recipes.fp8 import Fp8GivenQuant, Fp8Quant
from streamconv.targets.trtllm.recipes.gptq import Gptq
from streamconv.targets.trtllm.remarks import same_rows, spread
from streamconv.targets.trtllm.source_config import model_config
from streamconv.targets.trtllm.stated import options_of

_CONFIG = "config.json"
_READ = ("none", "int8", "int4", "fp8_rowwise", "int4_gptq", "int8_gptq", "fp8", "int4_awq")
"""Values of --quant whose weights are read back."""


def open_ranks(folder: Path) -> Index:
    """Open a TensorRT-LLM checkpoint under the names and with the config of the Hugging Face model. No weight is read but a few rows.

    Raises:
        CheckpointError: a rank is missing, or config.json does not describe the files.
        RefusedError: its weights are stored in a way that is not read.
    """
    config = read_json(folder / _CONFIG, MAX_CONFIG)
    try:
        ranks = [_rank(folder / f"rank{number}.safetensors") for number in range(expected.rank_count(config))]
        shapes = {rank.shard.path.name: {key: (at.dtype.name, at.shape) for key, at in rank.tensors.items()} for rank in ranks}
        problems, _ = expected.check(config, shapes)
        if problems:
            raise TensorError([f"{printable(folder)}: {problem}" for problem in problems])
        recorded = _manifest(folder)
        _check_peers(folder, config, ranks, recorded is not None)
        choices = _options(recorded, config, ranks[0])
    except VerifyError as error:
        raise CheckpointError(f"{printable(folder)}: {error.message}") from None
    if choices[0].quant not in _READ:
        place = f"{printable(folder / _CONFIG)}: quant_algo {config['quantization']['quant_algo']}"
        why = "smoothing has changed weights and the norms before them, and is not taken back"
        raise RefusedError([f"{place}: the weights of this format are not read back: {why}"], hint="start from the original model")
    source = None if recorded is None else recorded.source_config
    readers = [_Reader(folder, config, ranks, options, source) for options in choices]
    if len(readers) == 1:
        return readers[0].index()
    if isinstance(quant_of(choices[0].quant), Gptq):
        why = f"{printable(folder)}: nothing says for which GPU generation its group-wise integers are laid out"
        raise RefusedError([why], hint="streamconv.json does, of a checkpoint that streamconv made")
    return max(readers, key=_Reader.likeness).index(guessed=True)


def _rank(path: Path) -> RankFile:
    shard = Shard(path)
    return RankFile(shard, shard.header().tensors)


def _manifest(folder: Path) -> manifest.Manifest | None:
    """The manifest, where it is of this config.json."""
    if not os.path.lexists(folder / manifest.NAME):
        return None
    recorded = manifest.read_head(folder / manifest.NAME)
    with Shard(folder / _CONFIG) as file, file.window(0, file.size) as data:
        same = xxhash.xxh3_128(data).hexdigest() == recorded.config
    return recorded if same and recorded.target == TensorRTLLM.key else None


def _check_peers(folder: Path, config: Mapping[str, Any], ranks: Sequence[RankFile], recorded: bool) -> None:
    """The rank files are of one conversion, and each is in its place as far as a few tensors and a manifest tell.

    Raises:
        TensorError: one is of another model or conversion, or a copy of another.
    """
    by_name = {rank.shard.path.name: rank for rank in ranks}
    tensors = {name: tuple(rank.tensors) for name, rank in by_name.items()}
    problems = list(rank_peers.problems(config, tensors, rank_peers.sampled(by_name)))
    for name, rank in by_name.items() if recorded and not problems else ():
        names = set(manifest.recorded(folder / manifest.NAME, name))
        small = rank_peers.small_tensors(config, rank)
        wrong = [entry.name for entry in small if (entry.name, rank_peers.hash_of(rank.shard, entry)) not in names]
        if wrong:
            why = f"{printable(wrong[0])} holds other bytes than {manifest.NAME} tells"
            problems.append(f"{name} is not the file that was written there: {why}")
    problems = [f"{printable(folder)}: {problem}" for problem in problems]
    if problems:
        raise TensorError(problems, hint="put the rank files of one conversion there, each under its own name")


def _options(recorded: manifest.Manifest | None, config: Mapping[str, Any], rank: RankFile) -> list[TensorRTLLM]:
    """The options that a checkpoint was made with; several where nothing says for which generation its integers are laid out."""
    with contextlib.suppress(UsageError):  # the options of another version of streamconv
        options = None if recorded is None else target_from_json(recorded.target, recorded.asked)
        if isinstance(options, TensorRTLLM):
            return [options]
    choices = options_of(config, rank.tensors)
    return [choice for choice in choices if choice.target_version == choices[0].target_version]


class _Reader:
    """Turns a layout round.

    Args:
        source: the source's config.json, where it is known.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        ranks: Sequence[RankFile],
        options: TensorRTLLM,
        source: Mapping[str, Any] | None,
    ) -> None:
        self._folder, self._ranks, self._options = folder, ranks, options
        self._shards = tuple(rank.shard for rank in ranks)
        self._config, self._recorded = model_config(config, source), source is not None
        self._model = from_hf(self._config)
        self._family = family_of(self._model.architecture)
        self._dtype = MODEL_DTYPES[str(config["dtype"])]
        clamp = (config.get("quantization") or {}).get("clamp_val")
        self._bound = float(clamp[1]) if isinstance(clamp, list) and len(clamp) == 2 else None
        self._notes = () if source is not None else ("the model's own config.json is not recorded: it is worked out from the checkpoint's",)

    def index(self, guessed: bool = False) -> Index:
        """The checkpoint as a source.

        Args:
            guessed: the GPU generation is.
        """
        views = views_of(*self._layout(), self._ranks)
        self._leave_tied_head(views)
        tensors = TensorTable()
        for name, view in views.items():
            tensors.add(name, view.dtype, view.shape, view.pieces[0].shard, view.pieces[0].begin)
        origin = Origin(self._options, self._dtype.torch, self._bound, self._cache_factors())
        sm = f"nothing says for which GPU generation the integers are laid out: read as for --target-sm {self._options.target_sm}"
        notes = (*self._notes, sm) if guessed else self._notes
        left = (f"the scales of the {str(self._options.kv_cache).upper()} KV cache are left out",) if origin.cache_factors else ()
        return Index(self._folder, self._config, self._shards, tensors, notes=notes, views=views, origin=origin, left_behind=left)

    def likeness(self) -> float:
        """How much the integers look like weights, read in the layout of these options.

        A scale is the largest of a channel's weights, so that every channel has an integer at the end of their range, and most are
        small. Of group-wise integers neither is so.
        """
        views = views_of(*self._layout(), self._ranks)
        view = next(view for view in views.values() if isinstance(view, LaidOut))
        count = min(view.rows, 64)
        out, scratch = np.empty(count * view.cols, np.uint8), np.empty(count * view.scratch_row_bytes, np.uint8)
        view.read(self._shards, 0, count, out, scratch)
        half = 1 << (view.bits - 1)
        size = np.abs(out.view(np.int8).astype(np.int16)).reshape(count, -1)
        return float((size.max(1) >= half - 1).mean() - size.mean() / half)

    def _layers(self) -> Iterator[tuple[int, int, str]]:
        """Each layer: its number, the first file that holds it, and what the names of its tensors begin with there."""
        for stage, layers in enumerate(stage_layers(self._model.num_hidden_layers, self._options.pp_size, self._options.target_version)):
            for number, layer in enumerate(layers):
                yield layer, stage * self._options.tp_size, f"transformer.layers.{number}."

    def _cache_factors(self) -> dict[int, bytes]:
        """Layer -> factor of its KV cache."""
        factors = dict[int, bytes]()
        for layer, file, prefix in self._layers() if self._options.kv_cache is not None else ():
            entry = self._ranks[file].tensors[f"{prefix}attention.kv_cache_scaling_factor"]
            with self._shards[file].window(entry.begin, entry.end) as data:
                factors[layer] = bytes(data)
        return factors

    def _layout(self) -> tuple[Imagined, MatrixTable, SpanTable]:
        """What the layout would have read and where it would have put it, at the places where the files have it."""
        options, model, family = self._options, self._model, self._family
        roles = Imagined(family, {}, dtype=self._dtype)
        grid = ParallelMapping(options.tp_size, options.pp_size, *resolve_moe(options))
        draft = Draft(SourceTensors(Index(self._folder, {}, (), TensorTable())))  # what the layout reads is not there
        for shard in self._shards:
            draft.file(shard.path.name)
        kv = model.num_key_value_heads // (2 if options.remove_duplicated_kv_heads else 1)
        shared = "lm_head.weight" not in self._ranks[-1].tensors
        quant = quant_of(options.quant)
        if isinstance(quant, Fp8Quant):
            quant = Fp8GivenQuant(self._in_fp8())
        layout = RankLayout(model, family, options, self._dtype, grid, roles, quant, draft, kv, shared, False)
        layout.describe()
        if layout.refused:
            raise RefusedError(layout.refused)
        _, matrices, spans, _ = draft.finish()
        return roles, matrices.moved(self._begin), spans

    def _in_fp8(self) -> dict[tuple[int, str], Scales]:
        """(layer, module) of the matrices that are FP8: some may be left out."""
        scales = dict[tuple[int, str], Scales]()
        for layer, file, prefix in self._layers():
            for module in MODULES:
                entry = self._ranks[file].tensors.get(f"{prefix}{module}.weight")
                if entry is not None and entry.dtype.itemsize == 1:
                    scales[layer, module] = ((module, 1.0),)  # scales are read beside the matrix
        return scales

    def _begin(self, file: int, tensor: str) -> int:
        entry = self._ranks[file].tensors.get(tensor)
        if entry is None:
            name = printable(self._shards[file].path)
            raise TensorError(f"{name}: missing tensor {tensor}", hint="streamconv verify says what else is wrong")
        return entry.begin

    def _leave_tied_head(self, views: dict[str, SourceTensor]) -> None:
        """A stored output projection that is the embedding is not one of the model's own tensors."""
        names = [example(self._family, role, -1, -1) for role in ("embedding", "lm_head")]
        tied = is_tied(self._config)
        if names[1] in views:
            unknown = not self._recorded and "tie_word_embeddings" not in self._config
            pair = [views[name] for name in names]
            if not (tied or unknown) or not same_rows(self._shards, pair, spread(pair[0].rows)):
                return
            del views[names[1]]
        if not tied:
            self._config["tie_word_embeddings"] = True
