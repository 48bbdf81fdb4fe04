"""Whether a model's chat template renders, found out before the model serves anybody.

A template is a program by a stranger: it is run in Jinja's sandbox, in a process of its own, under a deadline
(`python -m millhand.language.chat_template`, the template on stdin).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from millhand.errors import ModelError

DEADLINE_S = 10.0
MEMORY_BYTES_CAP = 1 << 30
TRY_ANOTHER = "take the model from another source, or one whose template is mended"
CONVERSATION = (
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What does bearing 6205 need?"},
    {"role": "assistant", "content": "Grease."},
    {"role": "user", "content": "How much?"},
)


@cache
def check_template(template: str) -> str:
    """Render a conversation with a chat template. Returns what a user should know (`it takes no system message`).

    Raises ModelError where it does not render, leaves the question out, or does not end.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "millhand.language.chat_template"],
            input=json.dumps(template).encode(),
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"the chat template does not end within {DEADLINE_S:.0f} s", hint=TRY_ANOTHER) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        raise ModelError(f"the chat template took its process down: {words}", hint=TRY_ANOTHER) from error
    if answer["fault"]:
        raise ModelError(f"the chat template does not render: {answer['fault']}", hint=TRY_ANOTHER)
    return str(answer["note"])


def trial(template: str) -> dict[str, str]:
    """`fault` and `note` of a template; both empty where it renders everything."""
    fault = ""
    for messages, note in ((CONVERSATION, ""), (CONVERSATION[1:], "the chat template takes no system message")):
        try:
            text = render(template, messages)
        except Exception as error:  # of any kind: a template is a stranger's program
            fault = fault or f"{type(error).__name__}: {error}"[:300]
            continue
        if str(messages[-1]["content"]) in text:
            return {"fault": "", "note": note}
        fault = fault or "what the user says is not in what it makes"
    return {"fault": fault, "note": ""}


def render(template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The text that a model is given, as transformers' `apply_chat_template` makes it. Raises what Jinja raises."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(template).render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",  # noqa: S106 - a mark, not a secret
        eos_token="</s>",  # noqa: S106
        tools=None,
        documents=None,
    )


def main() -> None:
    """Entry point of the process."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_CAP, MEMORY_BYTES_CAP))
    sys.stdout.write(json.dumps(trial(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
