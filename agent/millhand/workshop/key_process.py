"""Asks one maker what a candidate would be tied to here: `python -m millhand.workshop.key_process '<JSON>'`.

Prints one JSON object: `key`, or `message` and `hint` where it cannot be told. Python 3.10.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from types import SimpleNamespace
from typing import Any

import msgspec

from millhand.errors import MillhandError, PluginError
from millhand.hookspecs import KeyedMaker
from millhand.workshop.recipe import Target


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON."""

    maker: str
    module: str
    """The plugin that brings the maker."""
    options: dict[str, Any] = {}
    """The plugin's validated table."""
    target: Target


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`message` is empty where there is a key."""

    key: dict[str, str] = {}
    message: str = ""
    hint: str = ""


def find_maker(module_name: str, name: str, options: dict[str, Any]) -> Any:
    """Import the plugin and return its maker of that name. Raises PluginError."""
    hook = importlib.import_module(module_name).millhand_makers
    makers = hook(SimpleNamespace(**options)) if inspect.signature(hook).parameters else hook()
    for maker in makers:
        if maker.name == name:
            return maker
    raise PluginError(f"plugin '{module_name}' brings no maker '{name}'", hint="look at 'millhand plugin list'")


def answer(question: Question) -> Answer:
    """Ask, whatever the plugin does."""
    try:
        maker = find_maker(question.module, question.maker, question.options)
        if not isinstance(maker, KeyedMaker):
            return Answer(message=f"maker '{question.maker}' does not tell", hint="update the plugin that brings it")
        return Answer(key={str(name): str(value) for name, value in maker.key(question.target).items()})
    except MillhandError as error:
        return Answer(message=error.message, hint=error.hint)
    except Exception as error:
        return Answer(message=f"{type(error).__name__}: {error}", hint="report this to the author of the plugin")


def main() -> None:
    """Entry point of the process. What libraries print goes to stderr: stdout is for the answer alone."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        out.write(msgspec.json.encode(answer(msgspec.json.decode(sys.argv[1], type=Question))))


if __name__ == "__main__":
    main()
