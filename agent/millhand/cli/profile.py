"""`millhand profile`: list, show and match hardware profiles."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.language import served_by
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, table

if TYPE_CHECKING:
    from millhand.hardware import Hardware
    from millhand.profiles import Match, Profile

GIB = 1 << 30
EXAMPLE_WEIGHTS_BYTES = 4 * 10**9


@click.group("profile")
def command() -> None:
    """List, show and match hardware profiles."""


@command.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List every profile, those of the highest priority first."""
    output: Output = ctx.obj
    profiles = _load(output)
    rows = [(profile.name, profile.match.priority, profile.description) for profile in profiles]
    data = [{"name": name, "priority": priority, "description": text} for name, priority, text in rows]
    shown = [(name, priority, textwrap.shorten(text, 48, placeholder=" …")) for name, priority, text in rows]
    output.emit(data, table(["name", "priority", "for"], shown))


@command.command("show")
@click.argument("name")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show every value of the profile NAME, also those that it takes from another."""
    from millhand.profiles import profile_named

    output: Output = ctx.obj
    profile = profile_named(_load(output), name).profile
    data = profile.model_dump(mode="json")
    output.emit(data, _profile_lines(data))


@command.command("match")
@click.option(
    "--root", type=click.Path(path_type=Path), help="Match this folder or file of recordings instead of the live node."
)
@json_option
@click.pass_context
def match_(ctx: click.Context, root: Path | None) -> None:
    """Say which profile fits this node, and why."""
    from millhand.hardware import discover
    from millhand.hardware.visible import VARIABLE, visible_devices
    from millhand.profiles import match

    output: Output = ctx.obj
    hardware = discover(root or output.config().node.hardware_root)
    found = match(_load(output), hardware, visible_devices(hardware, os.environ.get(VARIABLE)))
    lines = _match_lines(found, hardware)
    if root is None:  # what is installed here says nothing of another node
        lines += served_by(output, found, hardware)
    output.emit(_match_data(found, hardware), lines)


def _load(output: Output) -> list[Profile]:
    from millhand.profiles import load_profiles, profile_folders

    return load_profiles(profile_folders(output.config()))


def _match_data(found: Match, hardware: Hardware) -> dict[str, Any]:
    return {
        "profile": found.profile.name,
        "reasons": found.reasons,
        "workers": [worker.model_dump(mode="json") for worker in found.workers],
        "tensor_parallel": found.tensor_parallel,
        "joined": [{"gpus": joined.gpus, "link": joined.link} for joined in found.joined],
        "budgets_bytes": _budgets(found, hardware),
        "limits": found.profile.limits.model_dump(mode="json"),
        "too_hot": [problem.message for problem in found.profile.limits.problems(hardware)],
    }


def _budgets(found: Match, hardware: Hardware) -> dict[str, int | None]:
    """Accelerator -> bytes that models may take on it; `cpu` where the profile uses no GPU."""
    ready = [gpu for gpu in hardware.accelerators if gpu.ready]
    if found.profile.worker.isolation == "shared" or not ready:
        return {"cpu": found.profile.budget_bytes(hardware)}
    budgets = {}
    for gpu in ready:
        if not gpu.mig_enabled:
            budgets[gpu.uuid or str(gpu.index)] = found.profile.budget_bytes(hardware, gpu)
        for part in gpu.mig:
            budgets[part.uuid or f"{gpu.index}/{part.index}"] = found.profile.budget_bytes(hardware, part)
    return budgets


def _match_lines(found: Match, hardware: Hardware) -> list[str]:
    lines = [f"Profile     {found.profile.name} ({found.profile.description})"]
    for index, reason in enumerate(found.reasons):
        first = "Why         " if index == 0 else " " * 12
        lines += textwrap.wrap(reason, LINE_CHARACTERS, initial_indent=first, subsequent_indent=" " * 14)
    lines.append(f"Precisions  {', '.join(found.profile.precisions)}")
    lines.append(f"Backends    {', '.join(found.profile.backends)}")
    for index, worker in enumerate(found.workers):
        first = "Workers     " if index == 0 else " " * 12
        python = f", {worker.interpreter}" if worker.interpreter else ""
        lines.append(f"{first}{worker.accelerator}, batch up to {worker.max_batch}{python}")
    for index, (name, budget) in enumerate(_budgets(found, hardware).items()):
        first = "Budget      " if index == 0 else " " * 12
        lines.append(f"{first}{name}: {'not known' if budget is None else f'{budget / GIB:.1f} GiB'}")
    for index, joined in enumerate(found.joined):
        numbers = ", ".join(map(str, joined.gpus))
        link = f"{joined.link} or better" if joined.link else "links not known"
        lines.append(f"{'' if index else 'Joined best':<12}{len(joined.gpus)} GPUs: {numbers} ({link})")
    for problem in found.profile.limits.problems(hardware):
        text = f"{problem.field} is at {problem.message}. Try: {problem.hint}"
        lines += textwrap.wrap(text, LINE_CHARACTERS, initial_indent="Too hot     ", subsequent_indent=" " * 12)
    lines += textwrap.wrap(_language(found), LINE_CHARACTERS, initial_indent="Language    ", subsequent_indent=" " * 12)
    return lines


def _language(found: Match) -> str:
    language = found.profile.language
    text = f"{language.server}, {language.precision}, {language.slots} at once in {language.context_tokens} tokens each"
    if found.tensor_parallel > 1:
        text += f", spread over up to {found.tensor_parallel} GPUs"
    rate = found.profile.tokens_per_s(EXAMPLE_WEIGHTS_BYTES)
    return f"{text}, at most {rate:.0f} tokens/s with 4 GB of weights" if rate else text


def _profile_lines(data: dict[str, Any]) -> list[str]:
    lines = [f"{key} = {_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for key, section in data.items():
        if isinstance(section, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_value(value)}" for name, value in section.items() if value != {})]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return "-" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
