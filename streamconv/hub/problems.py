"""What huggingface_hub raises, as errors a user can act on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from streamconv.errors import HubError, StreamconvError, printable

Result = TypeVar("Result")
_TRIES = 3
_WAIT = 1.0
"""Seconds before the second try; doubled before the third. A server that says Retry-After is obeyed."""
_NOT_PASSING = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""An answer of another form than huggingface_hub expects."""
_BUSY = (408, 429, 500, 502, 503, 504)
_LONGEST = 60.0
"""A longer Retry-After is the user's to wait for."""


def ask(
    call: Callable[[], Result],
    repo: str,
    revision: str | None,
    file: str | None = None,
    transient: Callable[[BaseException], bool] | None = None,
) -> Result:
    """Call huggingface_hub, and again after a failure that may pass.

    Args:
        repo, revision, file: what is asked for, for errors.
        transient: whether what huggingface_hub raised may pass; a cut connection, 429 and 5xx by default.

    Raises:
        HubError: it did not pass; names what a user can do. Errors of streamconv as they are.
    """
    wait = _WAIT
    for attempt in range(_TRIES):
        try:
            return call()
        except StreamconvError:
            raise
        except Exception as error:
            cause = origin(error)
            asked = retry_after(cause)
            if attempt == _TRIES - 1 or not (transient or is_transient)(cause) or (asked or 0.0) > _LONGEST:
                raise _hub_error(error, repo, revision, file) from error
        time.sleep(wait if asked is None else asked)
        wait *= 2
    raise AssertionError


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server wants to be left alone, None if it does not say a number."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After")
    return float(value) if value is not None and value.isdecimal() else None


def origin(error: BaseException) -> BaseException:
    """What the server answered, where huggingface_hub says only that a file is not in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error


def is_busy(error: BaseException) -> bool:
    """The server answered that it cannot now."""
    return getattr(getattr(error, "response", None), "status_code", None) in _BUSY


def is_transient(error: BaseException) -> bool:
    """Worth another try."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError, but nobody was asked
        return False
    answered = getattr(getattr(error, "response", None), "status_code", None) is not None
    return is_busy(error) if answered else not isinstance(error, _NOT_PASSING)


def _hub_error(error: Exception, repo: str, revision: str | None, file: str | None) -> HubError:
    from huggingface_hub import errors

    what = f"hf://{repo}" + (f"@{printable(revision[:12])}" if revision else "") + (f"/{printable(file)}" if file else "")
    cause = origin(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, errors.GatedRepoError):
        return HubError(f"{what} is gated", hint=f"accept its terms on the Hub, then {login}")
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {printable(revision or 'main')} on the Hub")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return HubError(
            f"no such model on the Hub, or it is private: {repo} (status {status})",
            hint=f"check the name; for a private model {login}",
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return HubError(f"offline, and {what} is not in the cache", hint="unset HF_HUB_OFFLINE, or download it first")
    if status in (401, 403):
        return HubError(f"the Hub refuses access to {what} (status {status})", hint=login)
    if status == 404:
        return HubError(f"{what} is not on the Hub")
    if status == 429:
        seconds = retry_after(cause)
        wait = f"wait {seconds:.0f} s" if seconds else "wait some minutes"
        return HubError(f"the Hub has too many requests from here (status 429) for {what}", hint=f"{wait}; {login}")
    if status is not None:
        return HubError(f"the Hub answers {what} with status {status}", hint="try again later")
    first = printable((str(cause).strip() or type(cause).__name__).splitlines()[0])
    if isinstance(cause, errors.HFValidationError):
        return HubError(f"{what}: {first}")
    if "Consistency check failed" in first:
        return HubError(f"{what} came truncated", hint="run again; the download resumes")
    if isinstance(cause, ValueError) and "too large" in first:
        return HubError(f"{what}: {first}", hint="HF_HUB_DISABLE_XET=0 may help with files above 50 GB")
    if isinstance(cause, _NOT_PASSING):
        return HubError(f"the Hub answers {what} with something that is no answer: {first}", hint="check HF_ENDPOINT")
    if isinstance(cause, OSError) and cause.errno:
        return HubError(f"cannot download {what}: {os.strerror(cause.errno)}", hint="is there space in the cache (HF_HOME)?")
    return HubError(f"the connection to the Hub failed for {what}: {first}", hint="check the network, then run again")
