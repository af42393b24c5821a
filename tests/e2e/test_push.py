"""`streamconv push` against a server on 127.0.0.1 that takes commits as the Hub does."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from streamconv import api
from streamconv.targets.hf.target import HuggingFace
from tests import tiny, warm

REPO = "org/made"


class Taker:
    """A Hub that takes commits.

    Attributes:
        files: path -> content, of the last commit.
        made: what repositories and branches were asked for.
        branch: of the last commit.
        fail: path piece -> status that is answered.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.made: list[Any] = []
        self.branch = ""
        self.fail: dict[str, int] = {}
        taker = self

        class Handler(_Handler):
            pass

        Handler.taker = taker
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()


class _Handler(BaseHTTPRequestHandler):
    taker: Taker
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        taker, path = self.taker, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for piece, status in taker.fail.items():
            if piece in path:
                return self._send({"error": "no"}, status)
        if path == "/api/repos/create":
            taker.made.append(json.loads(body))
            return self._send({"url": f"{taker.url}/{REPO}", "id": REPO})
        if path == "/api/validate-yaml":  # of README.md
            return self._send({"errors": [], "warnings": []})
        if re.fullmatch(rf"/api/models/{REPO}/branch/\w+", path):
            taker.made.append(path.rpartition("/")[2])
            return self._send({})
        if f"/api/models/{REPO}/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            return self._send({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            actions = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{taker.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": actions})
        if path.startswith("/lfs/"):
            taker.blobs[path.removeprefix("/lfs/")] = body
            return self._send({})
        if f"/api/models/{REPO}/commit/" in path:
            taker.branch, taker.files = path.rpartition("/")[2], {}
            for line in map(json.loads, body.splitlines()):
                told = line["value"]
                if line["key"] == "file":
                    taker.files[told["path"]] = base64.b64decode(told["content"])
                elif line["key"] == "lfsFile":
                    taker.files[told["path"]] = taker.blobs[told["oid"]]
            sha = "1" * 40
            return self._send({"commitUrl": f"{taker.url}/{REPO}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})
        if path == f"/api/models/{REPO}" or "/revision/" in path:
            return self._send({"id": REPO, "sha": "0" * 40, "siblings": [], "private": False, "tags": [], "downloads": 0})
        return self._send({"error": path}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def taker() -> Iterator[Taker]:
    served = Taker()
    yield served
    served.server.shutdown()
    served.server.server_close()
    served.thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    source = tiny.write(folder / "source")
    (source / "odd[1].txt").write_text("odd")
    api.convert(source, folder / "out", HuggingFace(quant="fp8_dynamic"))
    return folder / "out"


def push(taker: Taker, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_ENDPOINT": taker.url, "HF_HOME": str(out.parent / "home"), "HF_TOKEN": "hf_x", "NO_PROXY": "*"}
    return warm.run(["-m", "streamconv", "push", str(out), *arguments], env=env)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_file_is_there_and_no_other(taker: Taker, made: Path) -> None:
    held = content(made)
    (made / "mine.txt").write_text("mine")
    try:
        done = push(taker, made, REPO, "--json")
    finally:
        (made / "mine.txt").unlink()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"repo": REPO, "revision": "main", "url": f"{taker.url}/{REPO}/commit/{'1' * 40}"}
    assert taker.files == held and taker.branch == "main" and content(made) == held


def test_private_and_a_branch(taker: Taker, made: Path) -> None:
    done = push(taker, made, REPO, "--private", "--revision", "quantized")
    assert done.returncode == 0, done.stderr
    assert taker.branch == "quantized" and taker.made[1] == "quantized"
    assert taker.made[0]["name"] == "made" and (taker.made[0].get("private") or taker.made[0].get("visibility") == "private")


def test_an_unfinished_output_is_refused(taker: Taker, made: Path, tmp_path: Path) -> None:
    problems = {"config.json": "no config.json", "streamconv.json": "no streamconv.json", "model.safetensors": "is missing"}
    for name, problem in problems.items():
        folder = tmp_path / name
        folder.mkdir()
        for other, data in content(made).items():
            if other != name:
                (folder / other).write_bytes(data)
        done = push(taker, folder, REPO)
        assert done.returncode == 6 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (folder / "model.safetensors").write_bytes(b"short")
    assert "has 5 bytes" in push(taker, folder, REPO).stderr
    assert not taker.made and not taker.files


@pytest.mark.parametrize(("piece", "status"), [("create", 400), ("commit", 403), ("preupload", 400)])
def test_what_the_hub_refuses(taker: Taker, made: Path, piece: str, status: int) -> None:
    taker.fail[piece] = status
    done = push(taker, made, REPO)
    assert done.returncode == 9 and str(status) in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_name_that_is_none(taker: Taker, made: Path) -> None:
    done = push(taker, made, "no-slash")
    assert done.returncode == 2 and "org/name" in done.stderr
