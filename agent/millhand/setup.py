"""First set-up of a node: five answers become a configuration, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from millhand.assets import faulty_assets
from millhand.config import Config, NodeSettings
from millhand.durable import write_durably
from millhand.errors import ConfigError
from millhand.owner import reading_group
from millhand.registry import Registry
from millhand.telemetry.settings import read_password
from millhand.validation import StrictTable, read_toml, validate

PASSWORD_NAME = "broker.password"  # noqa: S105 - a file's name
MODE = 0o640
"""Owner writes, the agent's group reads; nobody else, as options of adapters may hold secrets."""
MARK = "# answers: "
MACHINE_KEYS = frozenset({"assets", "plugins"})

HEAD = """\
# Written by `millhand setup`; yours from now on. After a change: `millhand check`, then `systemctl reload millhand`.
"""
HOST_ASSET = """\
[[assets]]
name = "node"
adapter = "host"
"""


class Answers(StrictTable):
    """What a node must be told. Every key has a default; `millhand setup --answers FILE` reads them from a file."""

    group: str = "millhand"
    """The plant or line, the same for every node of it."""
    node: str = Field(default_factory=lambda: NodeSettings().id)
    """This node's name in the fleet. Default: the host name, with '-' for what a name may not hold."""
    broker: str = ""
    """`mqtt://host:port` or `mqtts://host:port` of the broker before the hub; empty: nothing leaves the node."""
    username: str = ""
    """The broker's user, where it asks for one."""
    password_file: Path | None = None
    """A file whose first line is the broker's password; it is copied beside the configuration."""
    machines: str = "host"
    """Where the machine data comes from: a TOML file with `[[assets]]` tables (and `[plugins]`, if they need any),
    `host` for this node's own sensors, or `none`."""
    language: str = ""
    """A language model that was added under this name (`millhand model add`); empty: none."""


@dataclass(frozen=True)
class Draft:
    """What will be written: the configuration's text, and the broker's password."""

    text: str
    password: str

    @property
    def digest(self) -> str:
        """Of the answers: whether a configuration was made of them, also where it was edited since."""
        return self.text.split(MARK)[1].split("\n")[0]


def read_answers(path: Path) -> Answers:
    """Answers from a TOML file; paths in it are relative to it. Raises ConfigError."""
    answers = validate(Answers, read_toml(path), f"answers '{path}'")
    changed: dict[str, Any] = {}
    if answers.password_file is not None:
        changed["password_file"] = path.parent / answers.password_file
    if answers.machines not in ("host", "none"):
        changed["machines"] = str(path.parent / answers.machines)
    return answers.model_copy(update=changed)


def draft(answers: Answers, config_path: Path, password: str = "") -> Draft:
    """Make the configuration of the answers and check it as the agent would. Raises ConfigError."""
    if not password and answers.password_file is not None:
        password = read_password(answers.password_file)
    machines = _machines(answers.machines)
    lines = ["[node]", f"id = {_quoted(answers.node)}", f"group = {_quoted(answers.group)}"]
    if answers.broker:
        lines += ["", "[telemetry]", "enabled = true", f"brokers = [{_quoted(answers.broker)}]"]
        lines += [f"username = {_quoted(answers.username)}"] if answers.username else []
        lines += [f"password_file = {_quoted(str(config_path.parent / PASSWORD_NAME))}"] if password else []
    if answers.language:
        lines += ["", "[language]", f"model = {_quoted(answers.language)}"]
    body = "\n".join(lines) + "\n" + (f"\n{machines}" if machines else "")
    digest = hashlib.sha256(f"{body}\0{password}".encode()).hexdigest()[:16]
    text = f"{HEAD}{MARK}{digest}\n\n{body}"
    _check(text, answers)
    return Draft(text, password)


def write(made: Draft, path: Path, replace: bool = False) -> tuple[bool, Path | None]:
    """Write the configuration to `path`; returns whether anything changed, and where the one before is kept.

    One that was made of the same answers stays as it is, whatever was edited in it since. Another is replaced only if
    told so. Raises ConfigError.
    """
    try:
        before = path.read_bytes() if path.exists() else None
        if before is not None and f"{MARK}{made.digest}\n".encode() in before:
            return False, None
        if before is not None and not replace:
            raise ConfigError(
                f"'{path}' is there already and was not made of these answers",
                hint="edit it, or let it be replaced with --replace (the old one is kept beside it)",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if made.password:
            _write(path.parent / PASSWORD_NAME, f"{made.password}\n".encode())
        kept = None if before is None else _keep(path, before)
        _write(path, made.text.encode())
    except OSError as error:
        raise ConfigError(
            f"'{error.filename or path}' cannot be written: {error.strerror}",
            hint="run it as root, with room on a disk that can be written; the configuration is as it was",
        ) from error
    return True, kept


def _machines(source: str) -> str:
    """TOML text of the machines. Raises ConfigError where the file holds none, or something else."""
    if source == "none":
        return ""
    if source == "host":
        return HOST_ASSET
    path = Path(source)
    tables = read_toml(path)
    if not tables.get("assets"):
        raise ConfigError(f"'{path}' holds no [[assets]] table", hint="docs/adapters.md shows what one looks like")
    if others := sorted(tables.keys() - MACHINE_KEYS):
        raise ConfigError(
            f"'{path}': key '{others[0]}' belongs not to a machine",
            hint="leave [[assets]] and [plugins] in it; the rest is written to the configuration",
        )
    return path.read_text(encoding="utf-8")


def _check(text: str, answers: Answers) -> None:
    """Raise ConfigError for a configuration that the agent would refuse."""
    config = validate(Config, tomllib.loads(text), "answers")
    if answers.password_file and not answers.username:
        raise ConfigError("key 'password_file' is given but 'username' is empty", hint="name the broker's user")
    if answers.username and not answers.broker:
        raise ConfigError("key 'username' is given but 'broker' is empty", hint="name the broker, or no user")
    registry = Registry()
    registry.load(config.plugin_tables())
    if faults := faulty_assets(config, registry):
        raise ConfigError("\n".join(fault.message for fault in faults), hint=faults[0].hint)


def _quoted(text: str) -> str:
    """A TOML string: JSON's is one (TOML 1.0, basic strings), but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _keep(path: Path, data: bytes) -> Path:
    """Write what `path` held to the next free `<name>.<number>`."""
    names = (found.name.removeprefix(f"{path.name}.") for found in path.parent.glob(f"{path.name}.*"))
    number = max((int(name) for name in names if re.fullmatch(r"\d+", name)), default=0) + 1
    kept = path.with_name(f"{path.name}.{number}")
    _write(kept, data)
    return kept


def _write(path: Path, data: bytes) -> None:
    """Durably, readable for the agent."""
    write_durably(path, data, MODE, reading_group(path))
