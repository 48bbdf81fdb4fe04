"""A stand-in for `tensorrt-edgellm-serve` 0.11: its command line, and of its answers what millhand reads."""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELDS = {"messages", "model", "max_tokens", "temperature", "stream", "seed", "stop", "logprobs", "response_format"}

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("model")
parser.add_argument("--host", default="0.0.0.0")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--served-model-name", default="")
parser.add_argument("--reasoning-parser", choices=("auto", "none", "qwen3", "deepseek_r1"), default="auto")
parser.add_argument("--tool-call-parser", choices=("auto", "generic", "hermes", "qwen3_xml"), default="auto")
parser.add_argument("--enable-auto-tool-choice", action="store_true")
parser.add_argument("--max-queued-requests", type=int, default=16)
parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
parser.add_argument("--cache-dir", default="")
parser.add_argument("--engine-cache-max-size-gb", type=float, default=50.0)
parser.add_argument("--max-input-len", type=int, default=4096)
parser.add_argument("--max-batch-size", type=int, default=1)
parser.add_argument("--max-kv-cache-capacity", type=int, default=8192)
parser.add_argument("--enable-context-reuse", action="store_true")
parser.add_argument("--enable-in-flight-batching", action="store_true")
arguments = parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = self.path in ("/health", "/health/ready")
        self._answer(200 if known else 404, {"status": "ok"} if known else {"detail": "Not Found"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        unknown = sorted(set(asked) - FIELDS)
        if unknown:
            error = {"message": "Extra inputs are not permitted", "type": "invalid_request_error", "param": unknown[0]}
            self._answer(400, {"error": error})
            return
        message = {"role": "assistant", "content": "I am ready.", "reasoning_content": None, "tool_calls": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        self._answer(200, {"model": arguments.served_model_name, "choices": [choice], "usage": usage})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
