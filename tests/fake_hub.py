"""A small Hub on loopback for downloads: what huggingface.co answers, by the name of the repository asked for."""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import refalign_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class FakeHub:
    """Serves `files` (name -> bytes) as every repository `open/…`; others are refused, by the user's name.

    `gated/…` is gated, `private/…` is seen with `TOKEN` alone, `cut/…` breaks off in the middle of each large file,
    `busy/…` answers 503, `silent/…` never answers; with a wrong token nothing is seen. Anything else is not there.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.asked = files, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = unquote(self.path.partition("?")[0]).removeprefix("/api/models/").removeprefix("/api/datasets/")
                hub.asked.append(f"{self.command} {path}")
                user, name, *rest = [*path.strip("/").split("/"), "", ""]
                status, headers, body = hub.answer(user, name, [part for part in rest if part], self.headers)
                if user == "silent":
                    hub.closing.wait(60)
                    return
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    cut = user == "cut" and len(body) > 1000 and "resolve" in rest
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format, *arguments):
                pass

        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, user, name, rest, headers) -> tuple[int, dict[str, str], bytes]:
        sent = headers.get("Authorization")
        if sent not in (None, f"Bearer {TOKEN}"):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if user == "gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b""
        if user == "busy":
            return 503, {}, b""
        if user not in ("open", "cut", "private", "silent") or (user == "private" and sent is None):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if "no-such-branch" in rest:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": path, "size": len(data), "oid": ""} for path, data in self.files.items()]
            return 200, {}, json.dumps(tree).encode()
        if rest[:1] != ["resolve"]:
            siblings = [{"rfilename": path} for path in self.files]
            return 200, {}, json.dumps({"id": f"{user}/{name}", "sha": COMMIT, "siblings": siblings}).encode()
        body = self.files.get("/".join(rest[2:]))
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 200, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(files: dict[str, bytes]):
    """A `FakeHub` inside the context."""
    hub = FakeHub(files)
    try:
        yield hub
    finally:
        hub.close()


def client_environment(url: str, home: Path) -> dict[str, str]:
    """Environment of a process whose Hub is at `url`: the client reads it when it is imported."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(refalign_adapter.__file__).parents[1]),
    }
