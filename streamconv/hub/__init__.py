"""A model of the Hugging Face Hub as a source: `org/name[@revision]` or `hf://org/name[@revision]`.

Headers are read by range requests; a shard is downloaded when the run reaches it, the next one meanwhile. Cache, tokens,
endpoint, offline mode and resumed downloads are those of huggingface_hub, which is imported only when the Hub is asked.

Every file that convert, calibrate and verify --source read is hashed and compared with what the Hub lists (SHA-256 of LFS and Xet
files, git's SHA-1 of small ones), also where another program brought it into the cache; `plan` and `inspect` hash no weights. Offline
the names of the cache are the list; a cache without links has none, and is believed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from streamconv import targets
from streamconv.checkpoint.index import Index, open_index
from streamconv.errors import CheckpointError, HubError, printable

MEMORY = 48 << 20
"""What two downloads at a time hold, outside of the tiles."""
_NAME = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?!.*\.\.)([\w][\w./-]*))?")


def memory_of(index: Index) -> int:
    """Bytes that downloading takes beside the tiles; 0 for a local source."""
    return 0 if index.repo is None else MEMORY


def named(source: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """(repository, revision) if the source names a model of the Hub; a local file or folder of that name wins."""
    text = os.fspath(source)
    if os.path.lexists(text):
        return None
    match = _NAME.fullmatch(text)
    if match is None:
        if text.startswith("hf://"):
            raise HubError(f"{printable(text)} is not of the form hf://org/name or hf://org/name@revision")
        return None
    return match[1], match[2]


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The source as a folder (or file) of this machine: a model of the Hub is downloaded whole, with its tokenizer.

    Raises:
        HubError: the Hub did not give it. CheckpointError: it is no model, or in a layout that is not read from the Hub.
    """
    hub = named(source)
    if hub is None:
        if not os.path.lexists(source):  # as a Path ./org/name would look like a model of the Hub
            raise CheckpointError(f"no such file or folder: {printable(Path(source))}")
        return Path(source)
    from streamconv.hub.source import bring

    with open_source(source) as index:
        bring(hub[0], index)
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
    from streamconv.hub.source import open_repo  # a local folder needs nothing of the Hub's

    return open_repo(*hub, os.fspath(source))
