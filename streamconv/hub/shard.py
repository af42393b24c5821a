"""A file of the Hub: read by ranges while planning, downloaded when a run needs its rows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.header import parse_header
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.limits import MAX_HEADER
from streamconv.checkpoint.shard import Identity, Shard, identity_of
from streamconv.errors import HubError, SourceChangedError, StreamconvError, printable
from streamconv.hub.cache import Brought, remove
from streamconv.hub.problems import ask
from streamconv.hub.repo import Repo, RepoFile, download

if TYPE_CHECKING:
    from streamconv.hub.fetch import Fetch

AT_A_TIME = 2
"""Shards in the cache at most, with --hub-keep none: the one that is read and the next."""
_HEAD = 1 << 16
_REQUEST = 32 << 20
"""Bytes of a file that one request asks for at most: they are held twice until they have come."""


class HubShard(Shard):
    """A file of the Hub. Before `fetch` is set, reads are range requests; then the first one downloads the file.

    Args:
        folder: the snapshot's folder in the cache, where the file will appear.
    """

    __slots__ = ("_believed", "_checked", "_downloading", "_failed", "_head", "_ours", "_proof", "_remote", "fetch", "file", "repo")

    def __init__(self, repo: Repo, file: RepoFile, folder: Path) -> None:
        super().__init__(folder / file.name)
        self.repo, self.file = repo, file
        self.fetch: Fetch | None = None
        self._ours: Brought | None = None  # downloaded by this run, so that it may remove it
        self._checked = False
        self._believed: list[tuple[int, int, bytes]] = []  # what the plan was made from: begin, end, SHA-256
        self._remote = Identity(file.size, 0, 0, 0, 0)
        self._head = b""
        self._proof: Callable[[Shard], object] = lambda _: None
        self._failed: StreamconvError | None = None
        self._downloading = threading.Lock()

    @property
    def identity(self) -> Identity:
        """What the Hub says of the file: the same before and after the download."""
        return self._remote

    def sample(self) -> str:
        """The hash that the Hub lists says more than any sample."""
        return self.file.oid

    def prove(self, proof: Callable[[Shard], object]) -> None:
        self._proof = proof

    def fileno(self) -> int:
        if not self._checked and (self.fetch is not None or not self._there()):
            if self.fetch is not None:
                self.fetch.reached(self)
            self.download()
            self._head = b""
        return super().fileno()

    def download(self, ahead: bool = False) -> None:
        """Bring the file into the cache and hash it, if it was there as well; others who need it wait.

        Args:
            ahead: nobody needs it yet, so a failure is not final.
        """
        with self._downloading:
            if self._failed is not None:
                raise self._failed  # once is enough for all workers
            if self._checked or (ahead and self.fetch is None):
                return  # it is here, or was read and freed before its turn came
            try:
                _, ours, hashed = download(self.repo, self.file, shown=True)
                self._ours = self._ours or ours
                fd = super().fileno()
                if self._identity != identity_of(hashed):
                    raise self._changed("was replaced or changed")
                for begin, end, digest in self._believed:
                    if hashlib.sha256(os.pread(fd, end - begin, begin)).digest() != digest:
                        raise self._changed("was served with other bytes while planning")
                self._believed, self._checked = [], True
                self._proof(self)
            except StreamconvError as error:
                self._checked = False
                self._failed = None if ahead else error
                raise

    def free(self) -> None:
        """Remove the file, if this run downloaded it; a later read asks for ranges again."""
        self.check_unchanged()
        with self._downloading:
            self.fetch = None
            self.close()
            self._identity, self._checked = None, False
            if self._ours is not None:
                remove(self.path, self._ours)
                self._ours = None

    def view(self, begin: int, end: int) -> memoryview:
        """As of any file once it is in the cache, else a copy of just these bytes, by range requests."""
        if begin >= end or self._local():
            return super().view(begin, end)
        buffer = memoryview(bytearray(end - begin))
        for at in range(0, len(buffer), _REQUEST):
            self.read_into(begin + at, buffer[at : at + _REQUEST])
        return buffer

    def header(self) -> Header:
        if self._local():
            return super().header()
        shown = f"{self.repo}/{printable(self.file.name)}"
        self._head = self.read_range(0, min(self.file.size, _HEAD))
        stop = 8 + int.from_bytes(self._head[:8], "little")
        if len(self._head) < stop <= min(self.file.size, MAX_HEADER + 8) and self._head[8:9] == b"{":
            self._head += self.read_range(len(self._head), stop)
        return parse_header(self._head, self.file.size, shown)

    def check_unchanged(self) -> None:
        """A commit does not change; the copy in the cache could."""
        if self._checked:
            super().check_unchanged()

    def read_range(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file, from the Hub.

        Raises:
            HubError: it did not give exactly these.
        """
        if end <= len(self._head):
            return self._head[begin:end]
        if begin >= end:
            return b""
        data = ask(lambda: self._request(begin, end), self.repo.name, self.repo.commit, self.file.name)
        self._believed.append((begin, end, hashlib.sha256(data).digest()))
        return data

    def _request(self, begin: int, end: int) -> bytes:
        import huggingface_hub.utils
        from huggingface_hub import hf_hub_url

        client: Any = huggingface_hub.utils  # its names are public, but not declared to type checkers

        url = hf_hub_url(self.repo.name, self.file.name, revision=self.repo.commit)
        headers = client.build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        session: Any = client.get_session()
        with contextlib.ExitStack() as stack:
            if callable(getattr(session, "stream", None)):  # httpx, from huggingface_hub 1.0 on
                answer = stack.enter_context(session.stream("GET", url, headers=headers, timeout=30, follow_redirects=True))
                if answer.status_code >= 400:
                    answer.read()
                chunks = answer.iter_bytes
            else:
                answer = stack.enter_context(session.get(url, headers=headers, timeout=30, stream=True))
                chunks = lambda: answer.iter_content(1 << 16)  # noqa: E731
            client.hf_raise_for_status(answer)
            if answer.status_code != 206 and (begin, end) != (0, self.file.size):
                raise HubError(f"{url}: the server does not serve ranges", hint="check HF_ENDPOINT, or download the model")
            data = bytearray()
            for chunk in chunks():
                data += chunk
                if len(data) > end - begin:
                    break
        if len(data) != end - begin:
            raise ConnectionError(f"{len(data)} of {end - begin} bytes came")
        return bytes(data)

    def _local(self) -> bool:
        return self._fd >= 0 or self.fetch is not None or self._there()

    def _there(self) -> bool:
        """The whole file is in the cache."""
        return os.path.exists(self.path) and self.path.stat().st_size == self.file.size

    def _fill(self, offset: int, views: list[memoryview]) -> None:
        if self._local():
            super()._fill(offset, views)
            return
        total = sum(map(len, views))
        if offset + total > self.file.size:
            raise self._changed(f"ends at byte {self.file.size}, {offset + total - self.file.size} bytes early")
        data, at = self.read_range(offset, offset + total), 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def _changed(self, what: str) -> SourceChangedError:
        return SourceChangedError(f"{self.repo}/{printable(self.file.name)} {what}", hint="run again")
