"""A repository of the Hub as a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import os

from streamconv.checkpoint.foreign import foreign
from streamconv.checkpoint.index import Beside, Index, build_index
from streamconv.checkpoint.limits import MAX_CONFIG, MAX_MANIFEST, MAX_WEIGHT_MAP
from streamconv.checkpoint.meta import PARAMS
from streamconv.checkpoint.untrusted import read_json
from streamconv.checkpoint.weight_files import choose, weight_files
from streamconv.errors import CheckpointError, HubError, printable
from streamconv.hub.repo import download, listing, note_revision, small_file
from streamconv.hub.shard import AT_A_TIME, HubShard
from streamconv.run import manifest
from streamconv.run.fs import free_space

_CONFIG = "config.json"
_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""What goes with the weights: configuration and tokenizer."""
_SMALL = dict.fromkeys(("quantize_config.json", "quant_config.json", "hf_quant_config.json"), MAX_CONFIG) | {manifest.NAME: MAX_MANIFEST}
"""Files that are read beside config.json -> the most bytes of each."""


def open_repo(name: str, revision: str | None, said: str) -> Index:
    """Read the listing, the configuration and the headers of a model; the weights stay where they are.

    Args:
        said: what the user wrote; without hf:// it may have been meant as a path.

    Raises:
        HubError: the Hub did not give what was asked for. CheckpointError: it is no model, or in a layout that is not read from the Hub.
    """
    nested: list[str] = []
    try:
        repo, files = listing(name, revision, nested)
    except HubError as error:
        if not said.startswith("hf://"):
            error.message = f"there is no folder or file {printable(said)} here, and as a model of the Hub: {error.message}"
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
    note_revision(repo, revision)
    for small, limit in _SMALL.items():
        if small in files:
            small_file(repo, files[small], limit)
    chosen = choose(files, lambda name: small_file(repo, files[name], MAX_WEIGHT_MAP), files)
    if not chosen.names:
        raise foreign(str(repo), files) or CheckpointError(f"no .safetensors file in {repo}, nor any pytorch_model*.bin")
    shards = tuple(HubShard(repo, files[name], folder) for name in chosen.names)
    index = build_index(folder, read_json(folder / _CONFIG, MAX_CONFIG), shards, chosen)
    beside = (Beside(name, folder / name, file.size, functools.partial(download, repo, file, shown=False)) for name, file in files.items())
    return dataclasses.replace(index, beside=(*beside, *(Beside(name, folder / name, 0) for name in nested)), repo=repo.name)


def bring(name: str, index: Index) -> None:
    """Download the weights of an opened model, and what goes with them."""
    weights = {shard.file.name for shard in index.shards if isinstance(shard, HubShard)}
    repo, files = listing(name, index.root.name)
    for file in files.values():
        if file.name in weights or file.name.endswith(_BESIDE):
            download(repo, file, shown=file.name in weights)


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
