"""A model of the Hugging Face Hub as a source: `org/name[@revision]` or `hf://org/name[@revision]`.

Headers are read by range requests; a shard is downloaded when the run reaches it, the next one meanwhile. Cache, tokens,
endpoint, offline mode and resumed downloads are those of huggingface_hub, which is imported only when the Hub is asked.

Every file that convert, calibrate and verify --source read is hashed and compared with what the Hub lists (SHA-256 of LFS and Xet
files, git's SHA-1 of small ones), also where another program brought it into the cache; `plan` and `inspect` hash no weights. Offline
the names of the cache are the list; a cache without links has none, and is believed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

from streamconv import targets
from streamconv.checkpoint.foreign import foreign
from streamconv.checkpoint.index import Beside, Index, build_index, open_index
from streamconv.checkpoint.limits import MAX_CONFIG, MAX_MANIFEST, MAX_WEIGHT_MAP
from streamconv.checkpoint.meta import PARAMS
from streamconv.checkpoint.untrusted import read_json
from streamconv.checkpoint.weight_files import choose, weight_files
from streamconv.errors import CheckpointError, HubError, printable
from streamconv.hub.repo import download, listing, named, note_revision, small_file
from streamconv.hub.shard import AT_A_TIME, HubShard
from streamconv.run import manifest
from streamconv.run.fs import free_space

_CONFIG = "config.json"
MEMORY = 48 << 20
"""What two downloads at a time hold, outside of the tiles."""
_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""What goes with the weights: configuration and tokenizer."""
_SMALL = dict.fromkeys(("quantize_config.json", "quant_config.json", "hf_quant_config.json"), MAX_CONFIG) | {manifest.NAME: MAX_MANIFEST}
"""Files that are read beside config.json -> the most bytes of each."""


def memory_of(index: Index) -> int:
    """Bytes that downloading takes beside the tiles; 0 for a local source."""
    return MEMORY if any(isinstance(shard, HubShard) for shard in index.shards) else 0


def cache_need(index: Index) -> dict[str, int | None] | None:
    """Disk that a conversion takes in the cache beside its output, bytes; None for a local source.

    Returns:
        "all" and "none": what the cache gets at most, by --hub-keep; "free": what is free there, None if unknown.
    """
    remote = [shard for shard in index.shards if isinstance(shard, HubShard)]
    if not remote:
        return None
    missing = sorted((shard.file.size for shard in remote if not os.path.exists(shard.path)), reverse=True)
    return {"all": sum(missing), "none": sum(missing[:AT_A_TIME]), "free": free_space(remote[0].path.parent)}


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The source as a folder (or file) of this machine: a model of the Hub is downloaded whole, with its tokenizer.

    Raises:
        HubError: the Hub did not give it. CheckpointError: it is no model, or in a layout that is not read from the Hub.
    """
    hub = named(source)
    if hub is None:
        if not os.path.lexists(source):  # as a Path ./org/name would look like a model of the Hub
            raise CheckpointError(f"no such file or folder: {printable(str(Path(source)))}")
        return Path(source)
    with open_source(source) as index:
        weights = {shard.file.name for shard in index.shards if isinstance(shard, HubShard)}
        repo, files = listing(hub[0], index.root.name)
        for name, file in files.items():
            if name in weights or name.endswith(_BESIDE):
                download(repo, file, shown=name in weights)
        return index.root


def open_source(source: str | os.PathLike[str]) -> Index:
    """`open_stored` under the names that the family tables know.

    Raises:
        HubError: the Hub did not give what was asked for; else as open_index and settle.
    """
    from streamconv.families.naming import settle

    return settle(open_stored(source))


def open_stored(source: str | os.PathLike[str], tensors_only: bool = False) -> Index:
    """Open a local checkpoint or one of the Hub; reads config files and headers, downloads no weight.

    Args:
        tensors_only: as of open_index.

    Raises:
        HubError: the Hub did not give what was asked for; else as open_index.
    """
    hub = named(source)
    if hub is None:
        output = targets.opened(Path(source))
        return output if output is not None else open_index(source, tensors_only)
    nested: list[str] = []
    try:
        repo, files = listing(*hub, nested)
    except HubError as error:
        if not os.fspath(source).startswith("hf://"):  # it may have been meant as a path
            error.message = f"there is no folder or file {printable(os.fspath(source))} here, and as a model of the Hub: {error.message}"
        raise
    if _CONFIG not in files and PARAMS in files:
        raise CheckpointError(
            f"{repo} is in Meta's layout, which is converted from a local folder only",
            hint=f"hf download {repo.name} --revision {repo.commit} --local-dir FOLDER, then convert FOLDER",
        )
    if _CONFIG not in files:
        problem = None if weight_files(files) else foreign(str(repo), files)
        raise problem or CheckpointError(f"missing config.json in {repo}", hint="is it a transformers model?")
    folder = small_file(repo, files[_CONFIG], MAX_CONFIG).parent
    note_revision(repo, hub[1])
    for name, limit in _SMALL.items():
        if name in files:
            small_file(repo, files[name], limit)
    chosen = choose(files, lambda name: small_file(repo, files[name], MAX_WEIGHT_MAP), files)
    if not chosen.names:
        raise foreign(str(repo), files) or CheckpointError(f"no .safetensors file in {repo}, nor any pytorch_model*.bin")
    shards = tuple(HubShard(repo, files[name], folder) for name in chosen.names)
    index = build_index(folder, read_json(folder / _CONFIG, MAX_CONFIG), shards, chosen)
    beside = (Beside(name, folder / name, file.size, functools.partial(download, repo, file, shown=False)) for name, file in files.items())
    return dataclasses.replace(index, beside=(*beside, *(Beside(name, folder / name, 0) for name in nested)), repo=repo.name)
