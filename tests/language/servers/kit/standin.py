"""A small server of OpenAI's API that misbehaves on demand: `python standin.py WAYS_FILE PORT`."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WAYS = set(Path(sys.argv[1]).read_text().split())
KEY = os.environ.get("STANDIN_KEY")
BODIES = {
    "empty": {"choices": [{"message": {"content": ""}}], "usage": {"completion_tokens": 1}},
    "shapeless": {"answer": "yes"},
    "uncounted": {"choices": [{"message": {"content": "ready"}}]},
    "overcounted": {"choices": [{"message": {"content": "ready"}}], "usage": {"completion_tokens": 5000}},
    "list": [1, 2],
}
GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "I am ready"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(503 if "sick" in WAYS else 200, {"status": "ok"})
        elif self._is_strange():
            self._answer(401, {"error": {"message": "no key"}})
        elif self.path == "/metrics":
            text = "running 1\nsteps 7\n" if "stuck" in WAYS else "running 0\nsteps 7\n"
            self._send(200, text.encode())
        else:
            self._answer(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_strange():
            self._answer(401, {"error": {"message": "no key"}})
        elif "broken" in WAYS:
            self._answer(500, {"error": {"message": "the chat template fails at line 3"}})
        elif "garbage" in WAYS:
            self._send(200, b"<html>")
        elif "silent" in WAYS:
            time.sleep(3600)
        elif self.path == "/v1/embeddings":
            self._answer(200, {"data": [{"embedding": [0.0] if "empty" in WAYS else [0.6, 0.8]}]})
        else:
            body = next((BODIES[way] for way in WAYS if way in BODIES), GOOD)
            if "echo" in WAYS:
                body = {**GOOD, "choices": [{"message": {"content": json.dumps(asked)}, "finish_reason": "stop"}]}
            self._answer(200, body)

    def _is_strange(self) -> bool:
        return bool(KEY) and self.headers["Authorization"] != f"Bearer {KEY}"

    def _answer(self, status: int, body: object) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


def flood() -> None:
    while True:
        sys.stdout.write("one more line of noise that nobody needs\n" * 1000)


if "exits" in WAYS:
    print("loading\nerror: the model is broken\nbye", flush=True)
    sys.exit(3)
if "children" in WAYS:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
if "floods" in WAYS:
    threading.Thread(target=flood, daemon=True).start()
if "deaf" in WAYS:
    time.sleep(3600)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
