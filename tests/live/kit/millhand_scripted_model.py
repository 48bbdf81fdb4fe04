"""A plugin whose language server writes work orders by a script: as a large model would, one invention in each.

Run as a program it is the server: `python millhand_scripted_model.py PORT`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from millhand.hookspecs import LanguageServer, hookimpl
from millhand.language.launch import Ability, Command, Launch, ServerFigures

INVENTED = "Regrease the drive-end bearing with 31 g of KR-77."
ORDER = {
    "symptom": "Impacts from the outer race of the drive-end bearing, at 612.5 Hz.",
    "likely_cause": "Lack of lubrication of the outer race.",
    "action": ["Check lubrication: amount, colour, metal particles.", INVENTED, "Bypass the interlock of the bearing."],
    "priority": 4,
    "parts": ["drive-end bearing 6309-2RS"],
    "tools": ["grease gun"],
    "skill": "mechanical fitter",
    "minutes": 30,
    "evidence_ids": ["facts.velocity_rms_mm_s"],
    "citations": [],
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps(ORDER) if "response_format" in asked else "I am ready"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        self._answer({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Scripted:
    """Implements `LanguageServer`."""

    name = "scripted"
    formats: Sequence[str] = ("gguf",)
    abilities: frozenset[Ability] = frozenset({"chat", "json_schema", "seed", "usage"})

    def missing(self) -> str:
        return ""

    def command(self, launch: Launch) -> Command:
        return Command((sys.executable, os.fspath(__file__), str(launch.port)))

    def figures(self, metrics: str) -> ServerFigures:
        return ServerFigures()


@hookimpl
def millhand_language_servers() -> Sequence[LanguageServer]:
    return [Scripted()]


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
