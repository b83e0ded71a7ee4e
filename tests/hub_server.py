"""A model hub in a few lines, on this machine: listing, HEAD, ranges, gates, and connections that break on purpose."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    models: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    """Repository -> the status that it answers everything with."""
    drop_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection breaks, the first time."""
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run `hub` on a free port of 127.0.0.1; its address is in `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
            broken = [status for repo, status in hub.broken.items() if repo in self.path]
            if broken:
                self.refuse(broken[0])
            elif parts[:2] == ["api", "models"]:
                revision = "/".join(parts[5:]) if parts[4:5] == ["revision"] else "main"
                self.listing("/".join(parts[2:4]), revision)
            elif parts[2:3] == ["resolve"]:
                self.file("/".join(parts[:2]), "/".join(parts[4:]), body=body)
            else:
                self.refuse(404)

        def refuse(self, status: int, code: str = "") -> None:
            self.reply(status, b"", {"X-Error-Code": code} if code else {})

        def reply(self, status: int, body: bytes, headers: dict[str, str], *, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def allowed(self, repo: str) -> bool:
            signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return repo in hub.models and (repo not in hub.private or signed)

        def listing(self, repo: str, revision: str) -> None:
            if not self.allowed(repo):
                return self.refuse(401, "RepoNotFound")
            if revision not in {"main", "v1", "refs/pr/1", COMMIT}:
                return self.refuse(404, "RevisionNotFound")
            files = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                for name, data in hub.models[repo].items()
            ]
            body = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": []}).encode()
            return self.reply(200, body, {"Content-Type": "application/json"})

        def file(self, repo: str, name: str, *, body: bool) -> None:
            signed = self.headers.get("Authorization")
            if not self.allowed(repo):
                return self.refuse(401, "RepoNotFound")
            if repo in hub.gated and signed != f"Bearer {TOKEN}":
                return self.refuse(403 if signed else 401, "GatedRepo")
            if name not in hub.models[repo]:
                return self.refuse(404, "EntryNotFound")
            data = hub.models[repo][name]
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if not body:
                return self.reply(200, b"", headers, length=len(data))
            return self.stream(name, data, headers)

        def stream(self, name: str, data: bytes, headers: dict[str, str]) -> None:
            hub.asked[name] += 1
            start, status = 0, 200
            if wanted := self.headers.get("Range"):
                hub.ranges.append(wanted)
                start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            piece = data[start:]
            length = len(piece)
            if name in hub.drop_after:
                piece = piece[: hub.drop_after.pop(name)]
                self.close_connection = True
            hub.sent[name] += len(piece)
            self.reply(status, piece, headers, length=length)

    return Handler
