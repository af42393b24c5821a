"""Every answer that huggingface_hub gets is looked at before it is used: its size, and what of it becomes a path or text.

huggingface_hub gives the ETag of a file to the file system as a name, prints what some headers say, unpacks compressed answers of any
size, and writes a download to the end whatever its length.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from streamconv.errors import HubError, printable

MAX_ANSWER = 8 << 20
"""Bytes of an answer that is no file: a listing of some 30,000 files, or a message."""
_most: ContextVar[int] = ContextVar("most", default=MAX_ANSWER)
_TAG = re.compile(r"[\w+=-][\w.+=-]{0,127}", re.ASCII)
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_HINT = "check HF_ENDPOINT"


def watch() -> None:
    """Look at all answers from now on, also those of a client that huggingface_hub makes anew after a lost connection.

    The Xet client, which buffers gigabytes outside of any budget, is off unless HF_HUB_DISABLE_XET=0: call this before huggingface_hub
    is imported.
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub.utils import _http

    http: Any = _http
    httpx = hasattr(http, "set_client_factory")  # from huggingface_hub 1.0 on; requests before
    make = http._GLOBAL_CLIENT_FACTORY if httpx else http._GLOBAL_BACKEND_FACTORY
    if getattr(make, "watched", False):
        return

    def watched() -> Any:
        client = make()
        hooks = client.event_hooks if httpx else client.hooks
        hooks["response"] = [*hooks.get("response", ()), _look]
        return client

    watched.watched = True  # type: ignore[attr-defined]
    (http.set_client_factory if httpx else http.configure_http_backend)(watched)


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Answers to what is asked inside may have `size` bytes, or MAX_ANSWER if that is more."""
    before = _most.set(max(size, MAX_ANSWER))
    try:
        yield
    finally:
        _most.reset(before)


def _look(answer: Any, *_: Any, **__: Any) -> None:
    """Raises HubError for an answer that nobody may use."""
    for name, value in answer.headers.items():
        if _CONTROL.search(value):
            raise HubError(f"the Hub answers with control characters in the header {printable(name, 40)}", hint=_HINT)
    if answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity", "gzip", "deflate"):
        raise HubError("the Hub answers in an encoding that is not accepted", hint=_HINT)  # one in another unpacks without a bound
    if answer.request.method == "HEAD":
        for name in ("ETag", "X-Linked-Etag"):
            tag = answer.headers.get(name)
            if tag is not None and not _TAG.fullmatch(tag.removeprefix("W/").strip('"')):
                raise HubError(f"the Hub names a content {printable(tag, 80)}, which is no plain name", hint=_HINT)
    for chunks in ("iter_bytes", "iter_content"):  # httpx, requests: what they have unpacked
        if hasattr(answer, chunks):
            setattr(answer, chunks, _counted(getattr(answer, chunks), _most.get()))


def _counted(chunks: Callable[..., Iterator[bytes]], most: int) -> Callable[..., Iterator[bytes]]:
    def counted(*args: Any, **kinds: Any) -> Iterator[bytes]:
        left = most
        for chunk in chunks(*args, **kinds):
            left -= len(chunk)
            if left < 0:
                raise HubError(f"the Hub answers with more than {most} bytes, which is more than was asked for", hint=_HINT)
            yield chunk

    return counted
