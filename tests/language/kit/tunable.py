"""A stand-in for llama.cpp's server that says how long it took: `tunable.py PORT '<JSON>'`.

The JSON has `tokens`, those of every answer, and `ms`, the times of its answers one after the other, over and over.
"""

from __future__ import annotations

import itertools
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

told = json.loads(sys.argv[2])
times_ms = itertools.cycle(told["ms"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say({"status": "ok"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/apply-template":
            self._say({"prompt": "?"})
        else:
            self._say({"tokens": told["tokens"], "timings": {"prompt_ms": 0.0, "predicted_ms": next(times_ms)}})

    def _say(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Nothing."""


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
