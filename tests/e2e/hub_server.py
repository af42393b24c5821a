"""A server on 127.0.0.1 that speaks as much of the Hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"
LARGE = (".safetensors", ".bin", ".pth")
"""Kept apart and found by a redirect."""


def git_hash(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Serves a folder as `org/tiny` at one commit; `blobs` are behind a redirect, as the Hub's large files are.

    Attributes:
        served: file name -> bytes of it sent.
        whole: names of files asked for without a range.
        asked: files and pages that were asked for, as paths without the query.
        tokens: host -> Authorization headers that it got, "" for none.
        moods: (path piece, status, headers), each answered once, the first that fits.
        fail: path piece -> (status, X-Error-Code) answered for it.
        begun: told of each whole transfer before its first byte.
        cuts: file name -> after how many bytes the next whole transfer is cut.
        listing: what the listing becomes on its way: (bytes, headers).
        etags: file name -> the ETag it gets.
        headers: of all answers about files.
        sent: (file name, bytes, range asked for) -> what goes out in their place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.served: dict[str, int] = {}
        self.whole: list[str] = []
        self.ranges: list[tuple[str, str]] = []
        self.fail: dict[str, tuple[int, str]] = {}
        self.cuts: dict[str, int] = {}
        self.asked: list[str] = []
        self.tokens: dict[str, set[str]] = {}
        self.moods: list[tuple[str, int, dict[str, str]]] = []
        self.gets = 0
        self.begun: Callable[[str], object] = lambda name: None
        self.listing: Callable[[dict[str, Any]], tuple[bytes, dict[str, str]]] = lambda info: (json.dumps(info).encode(), {})
        self.etags: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.sent: Callable[[str, bytes, str | None], bytes] = lambda name, data, asked: data
        self.lock = threading.Lock()
        """Each connection has a thread; two of one client may ask at once."""

        class Handler(_Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, which must not get the token
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for the acknowledgement of its own first packet

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        with self.hub.lock:
            self.hub.gets += 1
        self._answer(True)

    def _error(self, status: int, code: str = "") -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"{}")

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, _: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(path)
        self.hub.tokens.setdefault(self.headers["Host"].split(":")[0], set()).add(self.headers.get("Authorization") or "")
        mood = self._mood(path)
        if mood is not None:
            return self._send(*mood, b"{}")
        for piece, (status, code) in self.hub.fail.items():
            if piece in path:
                return self._error(status, code)
        model = re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", path)
        if model:
            if model[1] not in (None, "main", SHA):
                return self._error(404, "RevisionNotFound")
            info, encoding = self.hub.listing(self._info())
            return self._send(200, {"Content-Type": "application/json"} | encoding, info)
        found = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path)
        if found and (self.hub.folder / found[2]).is_file():
            return self._file(found[2])
        found = re.fullmatch(r"/blobs/(.+)", path)
        if found:
            return self._blob(found[1])
        return self._error(404, "EntryNotFound" if REPO in path else "RepoNotFound")

    def _mood(self, path: str) -> tuple[int, dict[str, str]] | None:
        with self.hub.lock:
            for number, (piece, _, _) in enumerate(self.hub.moods):
                if piece in path and (self.command == "GET" or "blobs" not in piece):
                    return self.hub.moods.pop(number)[1:]
        return None

    def _info(self) -> dict[str, Any]:
        siblings = []
        for file in sorted(self.hub.folder.iterdir()):
            data = file.read_bytes()
            told: dict[str, Any] = {"rfilename": file.name, "size": len(data), "blobId": git_hash(data)}
            if file.suffix in LARGE:
                told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(told)
        return {"id": REPO, "modelId": REPO, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": siblings}

    def _file(self, name: str) -> None:
        data = (self.hub.folder / name).read_bytes()
        large = name.endswith(LARGE)
        etag = self.hub.etags.get(name) or (hashlib.sha256(data).hexdigest() if large else git_hash(data))
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'} | self.hub.headers
        if large:
            told = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/blobs/{name}"}
            return self._send(302, headers | told, b"")
        return self._body(name, data, headers)

    def _blob(self, name: str) -> None:
        self._body(name, (self.hub.folder / name).read_bytes(), dict(self.hub.headers))

    def _body(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        data = self.hub.sent(name, data, self.headers.get("Range"))
        total, status, asked = len(data), 200, self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
            headers |= {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
            status = 206
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(data))}
        if self.command == "HEAD":
            return self._send(status, headers, b"")
        (self.hub.whole.append(name) if asked is None else self.hub.ranges.append((name, asked)))
        if asked is None:
            self.hub.begun(name)
        with self.hub.lock:
            cut = self.hub.cuts.pop(name, None)
        if cut is not None:
            data = data[:cut]
        with self.hub.lock:  # before the client has all of it, and may end
            self.hub.served[name] = self.hub.served.get(name, 0) + len(data)
        self._send(status, headers, data)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
        return None
