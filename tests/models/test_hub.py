"""Models of the hub: a small server stands in for it, which counts who asks for what."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from dpo_ds.errors import UserError
from dpo_ds.models.hub import fetch, held
try:
    print(fetch("people/tiny", key="model.policy", weights=True, code=False), held("people/tiny"))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """A hub with one model: its address, and how often each file was sent."""
    sent: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path == "/api/models/people/tiny/revision/main":
                self.send(json.dumps({"id": "people/tiny", "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/models/people/tiny/tree/{COMMIT}":
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
                    for file in sorted(folder.iterdir())
                ]
                self.send(json.dumps(files).encode())
            elif (file := folder / path.removeprefix(f"/people/tiny/resolve/{COMMIT}/")).is_file():
                sent[file.name] += body
                self.send(file.read_bytes(), body=body, ETag=f'"{etag(file)}"', **{"X-Repo-Commit": COMMIT})
            else:
                self.send_error(404)

        def send(self, content: bytes, *, body: bool = True, **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def fetching(home: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def model(tiny_chat: Path, tmp_path: Path) -> Path:
    """What lies on the hub: a model, and what nobody here needs of it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in tiny_chat.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "code.py").write_text("raise SystemError")
    return folder


def test_two_nodes_with_one_cache_fetch_each_file_once_and_then_need_no_network(model, tmp_path):
    home = tmp_path / "home"
    with hub(model) as (address, sent):
        nodes = [fetching(home, HF_ENDPOINT=address) for _ in range(2)]
        said = [node.communicate(timeout=100) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
    wanted = {file.name for file in model.iterdir()} - {"consolidated.safetensors", "code.py"}
    assert sent == dict.fromkeys(wanted, 1)
    offline = fetching(home, HF_HUB_OFFLINE="1")
    said.append(offline.communicate(timeout=100))
    assert offline.returncode == 0, said
    snapshot = home / "hub/models--people--tiny/snapshots" / COMMIT
    assert [out for out, _ in said] == [f"{COMMIT} {snapshot}\n"] * 3


def test_a_model_that_is_not_there_is_named_with_the_cache_and_the_remedy(tmp_path):
    node = fetching(tmp_path, HF_HUB_OFFLINE="1")
    _, error = node.communicate(timeout=100)
    expected = f"error: model.policy people/tiny is neither a folder nor complete in the cache {tmp_path}/hub, and "
    assert error.startswith(expected + "HF_HUB_OFFLINE forbids to fetch it")
    assert error.count("\n") == 1
    assert error.endswith("fetch it where there is a network: hf download people/tiny\n")
