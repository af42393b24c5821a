"""What a repository of the Hub holds at a commit, and its files in the cache."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from streamconv.errors import CheckpointError, HubError, SourceChangedError, printable
from streamconv.hub.problems import explained, patiently

_NAME = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
_CONFIG = "config.json"
_SHA256 = re.compile("[0-9a-f]{64}")


class RepoFile(NamedTuple):
    """A file of a repository; `oid` names its content."""

    name: str
    size: int
    oid: str


class Repo(NamedTuple):
    """A repository at one commit."""

    name: str
    commit: str

    def __str__(self) -> str:
        return f"hf://{self.name}@{self.commit[:12]}"


def named(source: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """(repository, revision) if the source names a model of the Hub; a local file or folder of that name wins."""
    text = os.fspath(source)
    if os.path.lexists(text):
        return None
    found = _NAME.fullmatch(text)
    if found is None:
        if text.startswith("hf://"):
            raise HubError(f"{printable(text)} is not of the form hf://org/name or hf://org/name@revision")
        return None
    return found[1], found[2]


def listing(name: str, revision: str | None) -> tuple[Repo, dict[str, RepoFile]]:
    """The files at the top of a repository, at the commit that the revision means now."""
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    def ask() -> huggingface_hub.ModelInfo:
        with explained(name, revision):
            return huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)

    try:
        info = patiently(ask)
    except HubError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            return _cached(name, revision)
        raise
    files = {}
    for found in info.siblings or ():
        lfs = found.lfs
        oid = lfs.sha256 if lfs is not None else found.blob_id
        size = lfs.size if lfs is not None and found.size is None else found.size
        if "/" not in found.rfilename and size is not None:
            files[found.rfilename] = RepoFile(found.rfilename, size, oid or "")
    if info.sha is None:
        raise HubError(f"the Hub does not say which commit of {name} is meant", hint="check HF_ENDPOINT")
    return Repo(name, info.sha), files


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
        if path.is_file():
            files[path.name] = RepoFile(path.name, path.stat().st_size, path.resolve().name)
    return Repo(name, folder.name), files


def note_revision(repo: Repo, revision: str | None) -> None:
    """Let the cache know which commit a branch means, so that it is found offline."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    there = try_to_load_from_cache(repo.name, _CONFIG, revision=revision)
    if not isinstance(there, str) or Path(there).parent.name != repo.commit:
        with _quiet(True), explained(repo.name, revision, _CONFIG):
            hf_hub_download(repo.name, _CONFIG, revision=revision)


@contextlib.contextmanager
def _quiet(hide: bool) -> Iterator[None]:
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
    return download(repo, file, shown=False)


def download(repo: Repo, file: RepoFile, shown: bool) -> Path:
    """The file in the cache, where it is downloaded to if it is not there; a cut connection is taken up again."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    there = try_to_load_from_cache(repo.name, file.name, revision=repo.commit)
    if isinstance(there, str):
        path = Path(there)
    else:
        with _quiet(not (shown and sys.stderr.isatty())), explained(repo.name, repo.commit, file.name):
            path = Path(hf_hub_download(repo.name, file.name, revision=repo.commit))
    size = path.stat().st_size
    if size != file.size:
        raise HubError(
            f"{repo}/{file.name} is truncated: {size} of {file.size} bytes in {printable(str(path))}",
            hint="remove that file and run again",
        )
    return path


def check_content(repo: Repo, file: RepoFile, path: Path) -> None:
    """A file of the cache must be the one that was listed: there it bears its ETag, for a large file the SHA-256 of the listing.

    Raises:
        SourceChangedError: it is another one.
    """
    held = path.resolve().name
    if _SHA256.fullmatch(file.oid) and _SHA256.fullmatch(held) and held != file.oid:
        raise SourceChangedError(f"{repo}/{printable(file.name)}: its content has changed since the Hub listed it", hint="run again")
