"""`millhand setup`: from a bare node to a configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millhand.cli.output import Output, json_option, silence_registry, wrapped
from millhand.errors import InputError
from millhand.owner import start_command

if TYPE_CHECKING:
    from millhand.findings import Finding
    from millhand.setup import Answers


@click.command("setup")
@click.option(
    "--answers", "answers_path", type=click.Path(path_type=Path), help="Read the answers from this TOML file."
)
@click.option("--replace", is_flag=True, help="Replace a configuration that is there; the old one is kept beside it.")
@click.option("--no-check", is_flag=True, help="Do not check the node afterwards.")
@json_option
@click.pass_context
def command(ctx: click.Context, answers_path: Path | None, replace: bool, no_check: bool) -> None:
    """Set this node up: five questions, or one file with the answers.

    Writes the configuration whole or not at all, checks the node and says what comes next. With answers that it was
    made of before, nothing changes. Exits 0 where the node is set up, 4 where the check finds errors.
    """
    from millhand.cli import EXIT_CODES
    from millhand.config import DEFAULT_PATH, load_config
    from millhand.diagnosis import diagnose
    from millhand.setup import draft, read_answers, write

    output: Output = ctx.obj
    path = output.config_path or DEFAULT_PATH
    silence_registry()
    password = ""
    if answers_path is not None:
        answers = read_answers(answers_path)
    else:
        answers, password = _asked(path, replace)
    changed, kept = write(draft(answers, path, password), path, replace)
    findings = [] if no_check else [finding for finding in diagnose(path) if finding.level != "ok"]
    errors = any(finding.level == "error" for finding in findings)
    running = not any(finding.name == "daemon" for finding in findings)
    steps = _next_steps(output.config_path, load_config(path).node.data_dir, errors, running)
    data = {
        "config": str(path),
        "changed": changed,
        "kept": str(kept) if kept else None,
        "findings": [finding.to_dict() for finding in findings],
        "next": steps,
    }
    output.emit(data, [*_said(path, changed, kept), *_found(findings), *wrapped(f"Next: {steps[0]}")])
    ctx.exit(EXIT_CODES["check_errors"] if errors else EXIT_CODES["ok"])


def _asked(path: Path, replace: bool) -> tuple[Answers, str]:
    """Ask a person; returns the answers and the broker's password. Raises InputError where nobody can answer."""
    from millhand.setup import Answers
    from millhand.validation import validate

    if path.exists() and not replace:
        raise InputError(f"'{path}' is there already", hint="edit it, or set the node up anew with --replace")
    if not sys.stdin.isatty():
        raise InputError("there is nobody to ask: standard input is no terminal", hint="give --answers FILE")
    plain = Answers()
    given: dict[str, str] = {
        "group": click.prompt("1. Plant or line", plain.group),
        "node": click.prompt("2. This node's name", plain.node),
        "broker": click.prompt("3. Broker, as mqtt://host:1883 (empty: none)", "", show_default=False),
    }
    password = ""
    if given["broker"]:
        given["username"] = click.prompt("   Its user (empty: none)", "", show_default=False)
    if given.get("username"):
        password = click.prompt("   Its password", "", show_default=False, hide_input=True)
    given["machines"] = click.prompt("4. Machines: a TOML file with [[assets]], host or none", plain.machines)
    given["language"] = click.prompt("5. Language model, by its name (empty: none)", "", show_default=False)
    return validate(Answers, given, "answers"), password


def _said(path: Path, changed: bool, kept: Path | None) -> list[str]:
    if not changed:
        return wrapped(f"Nothing changed: '{path}' was made of these answers.")
    return wrapped(f"Written: '{path}'." + (f" The one before is '{kept}'." if kept else ""))


def _found(findings: list[Finding]) -> list[str]:
    """What `check` would say, but for what is well and for the agent, which is not started yet."""
    from millhand.cli.check import MARKS

    lines = []
    for finding in findings:
        if finding.name != "daemon":
            lines += wrapped(f"{MARKS[finding.level]}  {finding.name}: {finding.message}", rest=" " * 6)
            lines += wrapped(f"Try: {finding.hint}", " " * 6, " " * 11) if finding.hint else []
    return lines


def _next_steps(config_path: Path | None, data_dir: Path, errors: bool, running: bool) -> list[str]:
    """Commands, the first of them next."""
    option = f" -c {config_path}" if config_path else ""
    managed = config_path is None and Path("/run/systemd/system").exists()
    by_systemd = f"sudo systemctl {'restart' if running else 'start'} millhand"
    start = by_systemd if managed else start_command(data_dir, option)
    mend = [f"mend what is marked FAIL, then `millhand{option} check`"] if errors else []
    return [*mend, f"`{start}`", f"`millhand{option}` shows the state"]
