"""The output of --quant keep: which tensor lies in which file, and what the configs say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.errors import UsageError
from streamconv.planning.draft import Draft
from streamconv.targets.hf import config_json
from streamconv.targets.hf.keep import keep
from streamconv.targets.hf.keep_ranks import keep_ranks
from streamconv.targets.hf.shards import shards_of
from streamconv.targets.hf.side_files import OLD, side_files
from streamconv.targets.hf.target import CONTAINERS
from streamconv.targets.hf.units import Kind
from streamconv.targets.hf.weights import Told

if TYPE_CHECKING:
    from streamconv.targets.hf.target import HuggingFace


def describe_kept(index: Index, target: HuggingFace, units: Sequence[Kind[Told]], draft: Draft) -> None:
    """Describe it to a draft.

    Raises:
        UsageError: options that would change codes, or a container that does not take them.
    """
    flags: dict[str, object] = {"--ignore": target.ignore, "--only": target.only, "--dtype": target.dtype != "auto"}
    flags["--allow-nonfinite"] = target.allow_nonfinite
    changed = [flag for flag, there in flags.items() if there]
    if changed:
        raise UsageError(f"{' and '.join(changed)}: --quant keep changes no weight")
    wanted = next((container for container in CONTAINERS if container == target.format), None)
    if index.views:
        kept = keep_ranks(index, SourceTensors(index), wanted, draft, target.model_dtype(index))
    else:
        kept = keep(index, SourceTensors(index), wanted, units, draft)
    sizes = ((name, kept.files[name], nbytes) for name, nbytes in kept.nbytes.items())
    for name, tensors in shards_of(index, sizes, target.max_shard_size).items():
        number = draft.file(name, {"format": "pt"})
        for tensor in tensors:
            kept.tensors[tensor](number)
    copied, left_out = side_files(index, OLD if kept.quantization is None else ())
    draft.warnings += left_out
    draft.side_files += copied
    config_json.add_index(draft)
    if kept.second is not None:
        draft.side_file("hf_quant_config.json", kept.second)
    stated = index.config.get("quantization_config") if kept.quantization is None else kept.quantization
    draft.side_file("config.json", config_json.output_config(index.config, stated if isinstance(stated, dict) else None, None))
    draft.decisions["weights"] = f"kept as they are, in the container {kept.container}"
