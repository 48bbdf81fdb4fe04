"""A hub on loopback that speaks the Hugging Face Hub's file API, and can stall, lie and forget."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `plant/model`."""

    files: dict[str, bytes]
    large: tuple[str, ...] = ()
    """Kept as LFS objects: hashed with SHA-256, and fetched from another place, as the real hub does."""
    card: dict[str, Any] = field(default_factory=dict)
    stall_after: int = 0
    """Stop sending after so many bytes of a large file, and hold the connection, until `let_go`."""
    altered: dict[str, bytes] = field(default_factory=dict)
    """Sent in the place of what the hub speaks of."""
    ranges: list[str] = field(default_factory=list)
    """`Range` of each GET of a large file; empty for none."""
    tokens: list[str] = field(default_factory=list)
    """`Authorization` that came to the place of large files."""
    url: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def git_sha1(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": self.git_sha1(name),
                **({"lfs": {"sha256": self.sha256(name), "size": len(data), "pointerSize": 130}}
                   if name in self.large else {}),
            }
            for name, data in self.files.items()
        ]  # fmt: skip
        return {"id": "plant/model", "sha": COMMIT, "siblings": siblings, "cardData": self.card, "tags": []}


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.let_go.set()
            server.shutdown()
            thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            """Stay silent."""

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            path = urlsplit(self.path).path
            if path == "/api/models/plant/model" or path.startswith("/api/models/plant/model/revision/"):
                self._send(200, {"Content-Type": "application/json"}, json.dumps(hub.info()).encode(), body)
            elif path.startswith(f"/plant/model/resolve/{COMMIT}/"):
                self._resolve(path.rpartition("/")[2], body)
            elif path.startswith("/objects/"):
                self._object(path.rpartition("/")[2], body)
            else:
                head = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                self._send(404, head, b"{}", body)

        def _resolve(self, name: str, body: bool) -> None:
            head = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if name in hub.large:
                head |= {
                    "X-Linked-Etag": f'"{hub.sha256(name)}"',
                    "X-Linked-Size": str(len(hub.files[name])),
                    "Location": f"http://localhost:{self.server.server_address[1]}/objects/{name}",
                }
                self._send(302, head, b"", body)
            else:
                data = hub.altered.get(name, hub.files[name])
                self._send(200, head | {"ETag": f'"{hub.git_sha1(name)}"'}, data, body)

        def _object(self, name: str, body: bool) -> None:
            hub.tokens.append(self.headers.get("Authorization", ""))
            wanted = self.headers.get("Range", "")
            hub.ranges.append(wanted)
            data = hub.altered.get(name, hub.files[name])
            first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            head = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if wanted else {}
            self._send(206 if wanted else 200, head, data[first:], body)

        def _send(self, status: int, head: dict[str, str], data: bytes, body: bool) -> None:
            self.send_response(status)
            for name, value in head.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if hub.stall_after and self.path.startswith("/objects/"):
                self.wfile.write(data[: hub.stall_after])
                self.wfile.flush()
                hub.stalled.set()
                hub.let_go.wait(60)
                self.close_connection = True
                return
            self.wfile.write(data)

    return Handler
