"""What a repository of the Hub holds at a commit, and its files in the cache."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from streamconv.errors import CheckpointError, HubError, StreamconvError, printable
from streamconv.hub.answers import at_most, watch
from streamconv.hub.cache import Brought, blobs, brought, check_content, remove
from streamconv.hub.problems import ask, is_busy

_CONFIG = "config.json"
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""Git's SHA-1 of a small file, SHA-256 of a large one (in LFS or Xet)."""
_COMMIT = re.compile("[0-9a-f]{40}")


class RepoFile(NamedTuple):
    """A file of a repository; `oid` is the hash of its content (see `cache.check_content`)."""

    name: str
    size: int
    oid: str


class Repo(NamedTuple):
    """A repository at one commit."""

    name: str
    commit: str

    def __str__(self) -> str:
        return f"hf://{self.name}@{self.commit[:12]}"


def listing(name: str, revision: str | None, nested: list[str] | None = None) -> tuple[Repo, dict[str, RepoFile]]:
    """The files at the top of a repository, at the commit that the revision means now; all that the listing says is checked here.

    Args:
        nested: gets the names of the files in folders, which are not read.
    """
    watch()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = ask(lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30), name, revision)
    except HubError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            return _cached(name, revision)
        raise
    if type(info.sha) is not str or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"the Hub does not say which commit of {name} is meant", hint="check HF_ENDPOINT")
    files = {}
    for sibling in info.siblings or ():
        file, lfs = sibling.rfilename, sibling.lfs
        if type(file) is str and (not plain(file)):
            if nested is not None and "/" in file and all(map(plain, file.split("/"))):
                nested.append(file)
            continue  # in a folder, or under a name that is never read
        size, oid = (sibling.size, sibling.blob_id) if lfs is None else (lfs.size, lfs.sha256)
        if type(file) is not str or type(size) is not int or not 0 <= size < 1 << 63 or type(oid) is not str or not _HASH.fullmatch(oid):
            raise HubError(f"the Hub lists {name}/{printable(file)} without a size or a hash", hint="check HF_ENDPOINT")
        files[file] = RepoFile(file, size, oid)
    return Repo(name, info.sha), files


def plain(name: str) -> bool:
    """A name that leads nowhere else and can be shown."""
    fits = 0 < len(name.encode(errors="replace")) <= 255 and name not in (".", "..")
    return fits and name.isprintable() and not any(mark in name for mark in "/\\:")


def _cached(name: str, revision: str | None) -> tuple[Repo, dict[str, RepoFile]]:
    """The same from the cache alone."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, _CONFIG, revision=revision)
    if not isinstance(config, str):
        at = f"@{revision}" if revision else ""
        raise HubError(f"offline, and {name}{at} is not in the cache", hint="unset HF_HUB_OFFLINE, or download it first")
    folder = Path(config).parent
    files = {}
    for path in folder.iterdir():
        if os.path.isfile(path) and plain(path.name):
            oid = path.resolve().name  # without links the cache does not say what a file must hold
            files[path.name] = RepoFile(path.name, path.stat().st_size, oid if _HASH.fullmatch(oid) else "")
    return Repo(name, folder.name), files


def note_revision(repo: Repo, revision: str | None) -> None:
    """Let the cache know which commit a branch means, so that it is found offline."""
    from huggingface_hub import try_to_load_from_cache

    there = try_to_load_from_cache(repo.name, _CONFIG, revision=revision)
    if not isinstance(there, str) or Path(there).parent.name != repo.commit:
        with quiet(True):
            _bring(repo.name, _CONFIG, revision)


def _bring(name: str, file: str, revision: str | None) -> Path:
    """Download a file into the cache; huggingface_hub takes up a cut connection itself, but asks a busy server once."""
    from huggingface_hub import hf_hub_download

    return Path(ask(lambda: hf_hub_download(name, file, revision=revision), name, revision, file, is_busy))


@contextlib.contextmanager
def quiet(hide: bool) -> Iterator[None]:
    """No progress bars, if they are not off anyway."""
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils  # its names are public, but not declared to type checkers
    hide = hide and not bars.are_progress_bars_disabled()
    if hide:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bars()


def small_file(repo: Repo, file: RepoFile, limit: int) -> Path:
    if file.size > limit:
        raise CheckpointError(f"{repo}/{printable(file.name)} has {file.size} bytes; at most {limit} are accepted")
    return download(repo, file, shown=False)[0]


def download(repo: Repo, file: RepoFile, shown: bool) -> tuple[Path, Brought | None, os.stat_result]:
    """The file in the cache, where it is downloaded to if it is not there; a cut connection is taken up again.

    Returns:
        where it is, what of it was not there before, and what the system says of it. Its content has been hashed, whoever brought it.

    Raises:
        HubError: the Hub did not give it. SourceChangedError: it holds something else than the Hub lists; what came is removed.
    """
    from huggingface_hub import try_to_load_from_cache

    shown_name, ours = f"{repo}/{printable(file.name)}", None
    there = try_to_load_from_cache(repo.name, file.name, revision=repo.commit)
    if isinstance(there, str):
        path = Path(there)
    else:
        before = blobs(cached_folder(repo))
        with quiet(not (shown and sys.stderr.isatty())), at_most(file.size):
            path = _bring(repo.name, file.name, repo.commit)
        if path.parent != cached_folder(repo):
            raise HubError(f"{shown_name} came as a file of another commit", hint="check HF_ENDPOINT")
        ours = brought(path, before)
    try:
        size = path.stat().st_size
        if size != file.size:
            raise HubError(
                f"{shown_name} is truncated: {size} of {file.size} bytes in {printable(path)}", hint="remove that file and run again"
            )
        hashed = check_content(path, file.oid, shown_name)
    except StreamconvError:
        if ours is not None:
            remove(path, ours)
        raise
    return path, ours, hashed


def cached_folder(repo: Repo) -> Path:
    """The snapshot's folder in the cache, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, "models--" + repo.name.replace("/", "--"), "snapshots", repo.commit)
