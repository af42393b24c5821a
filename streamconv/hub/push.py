"""A finished output goes to the Hub, in one commit."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from streamconv.errors import HubError, OutputError, UsageError, VerifyError, printable
from streamconv.hub.answers import watch
from streamconv.hub.problems import ask
from streamconv.hub.repo import quiet
from streamconv.run import manifest
from streamconv.run.place import CONFIG

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WILD = re.compile(r"([*?[])")


def push(out: str | os.PathLike[str], repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload every file of an output; what else lies in its folder stays here. Large files that the Hub has are not sent again.

    Args:
        repo: org/name; it is made if there is none.
        private: of a repository that is made.
        revision: the branch, made if there is none; None for the main one.

    Returns:
        where the commit is to be seen.

    Raises:
        UsageError: a name that the Hub does not take. OutputError: the folder is no finished output.
        HubError: the Hub did not take it.
    """
    if not _NAME.fullmatch(repo):
        raise UsageError(f"{printable(repo)} is no name of the Hub", hint="org/name, or your user name and a name")
    folder = Path(out)
    names = finished_files(folder)
    watch()
    from huggingface_hub import HfApi

    api = HfApi()

    def send() -> str:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Upload of streamconv",
            allow_patterns=[_WILD.sub(r"[\1]", name) for name in names],
        )
        return str(done.commit_url)

    try:
        with quiet(not sys.stderr.isatty()):
            return ask(send, repo, revision)
    except HubError as error:
        error.hint = error.hint or "what was uploaded is kept there: run the same command again"
        raise


def finished_files(folder: Path) -> list[str]:
    """The files of a finished output.

    Raises:
        OutputError: it is none, or a file is not as its manifest says.
    """
    shown = printable(folder)
    if not os.path.lexists(folder / manifest.NAME) or not os.path.lexists(folder / CONFIG):
        missing = CONFIG if os.path.lexists(folder / manifest.NAME) else manifest.NAME
        raise OutputError(f"{shown} is no finished output: it has no {missing}", hint="`streamconv convert` finishes it")
    try:
        written = manifest.read(folder / manifest.NAME)
    except VerifyError as error:
        raise OutputError(error.message, hint="convert the model again") from None
    sizes = written.sizes | {name: size for name, (size, _) in written.side.items()}
    for name, size in sizes.items():
        path = folder / name
        if not os.path.isfile(path) or path.stat().st_size != size:
            what = f"has {path.stat().st_size} bytes, and {size} were written" if os.path.isfile(path) else "is missing"
            raise OutputError(f"{printable(path)} {what}", hint="`streamconv verify` says what else is wrong")
    return sorted({*sizes, CONFIG, manifest.NAME})
