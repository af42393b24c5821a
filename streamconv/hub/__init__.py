"""A model of the Hugging Face Hub as a source: `org/name[@revision]` or `hf://org/name[@revision]`.

Headers are read by range requests; a shard is downloaded when the run reaches it, the next one meanwhile. Cache, tokens,
endpoint, offline mode and resumed downloads are those of huggingface_hub, which is imported only when the Hub is asked.
"""

from __future__ import annotations

import os

from streamconv.checkpoint.index import (
    MAX_CONFIG,
    MAX_WEIGHT_MAP,
    TORCH_WEIGHT_MAP,
    WEIGHT_MAP,
    Index,
    open_index,
    read_json,
    read_tensors,
    read_weight_map,
    weight_files,
)
from streamconv.errors import CheckpointError
from streamconv.hub.repo import listing, named, note_revision, small_file
from streamconv.hub.shard import HubShard

_CONFIG = "config.json"
MEMORY = 48 << 20
"""What two downloads at a time hold, outside of the tiles."""
_SMALL = (_CONFIG, "quantize_config.json", "quant_config.json", "hf_quant_config.json")


def memory_of(index: Index) -> int:
    """Bytes that downloading takes beside the tiles; 0 for a local source."""
    return MEMORY if any(isinstance(shard, HubShard) for shard in index.shards) else 0


def open_source(source: str | os.PathLike[str]) -> Index:
    """Open a local checkpoint or one of the Hub; reads config files and headers, downloads no weight.

    Raises:
        HubError: the Hub did not give what was asked for; else as open_index.
    """
    hub = named(source)
    if hub is None:
        return open_index(source)
    # The Xet client buffers gigabytes outside of any budget; plain HTTP does not. HF_HUB_DISABLE_XET=0 brings it back.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    repo, files = listing(*hub)
    if _CONFIG not in files:
        raise CheckpointError(f"missing config.json in {repo}", hint="is it a transformers model?")
    note_revision(repo, hub[1])
    folder = small_file(repo, files[_CONFIG], MAX_CONFIG).parent
    for name in _SMALL[1:]:
        if name in files:
            small_file(repo, files[name], MAX_CONFIG)
    names, weight_map = weight_files(files), None
    listed = WEIGHT_MAP if names and names[0].endswith(".safetensors") else TORCH_WEIGHT_MAP
    listed = WEIGHT_MAP if not names and WEIGHT_MAP in files else listed
    if listed in files:
        weight_map = read_weight_map(small_file(repo, files[listed], MAX_WEIGHT_MAP), files)
        names = sorted(set(weight_map.values()))
    if not names:
        raise CheckpointError(f"no .safetensors file in {repo}, nor any pytorch_model*.bin")
    shards = tuple(HubShard(repo, files[name], folder) for name in names)
    digests: dict[int, str] = {}
    try:
        tensors = read_tensors(shards, weight_map, digests)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return Index(folder, read_json(folder / _CONFIG, MAX_CONFIG), shards, tensors, digests)
