"""Bare `millhand`: the node's state in five lines, and the next step."""

from __future__ import annotations

from typing import Any

from millhand.cli.output import LINE_CHARACTERS, Output, shorten
from millhand.errors import ControlError

FAULTS_SHOWN = 3


def show_state(output: Output) -> None:
    """Print the state; where no daemon answers, say how to start one."""
    config = output.config()
    try:
        state = output.daemon().call("state")
    except ControlError as error:
        data = {"running": False, "node": config.node.id, "reason": error.message}
        assets = len(config.assets)
        lines = [
            f"Node       {config.node.group}/{config.node.id}",
            f"Agent      not running ({error.message})",
            f"Assets     {assets} configured",
        ]
        step = "millhand check" if assets else "millhand demo"
        output.emit(data, [*lines, f"Next step  {step}"])
        return
    output.emit(state, state_lines(state))


def state_lines(state: dict[str, Any]) -> list[str]:
    """Lay the daemon's answer to `state` out in a few lines and the next step."""
    telemetry, alerts = state["telemetry"], state["alerts"]
    lines = [
        f"Node       {state['group']}/{state['node']}, profile {state['profile']}, up {duration(state['uptime_s'])}",
        f"Assets     {_assets(state['assets'])}",
        *_faults(state["assets"]),
        f"Models     {_models(state['models'], state['http'])}",
        f"Alerts     {alerts['open']} open, {alerts['acked']} acknowledged; {state['orders']} work orders",
        f"Telemetry  {_telemetry(telemetry)}",
    ]
    return [*lines, f"Next step  {state['next_step']}"]


def duration(seconds: float) -> str:
    """A duration as people say it: `3 s`, `12 min`, `5 h`, `8 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _assets(assets: list[dict[str, Any]]) -> str:
    if not assets:
        return "none configured"
    counts: dict[str, int] = {}
    for asset in assets:
        counts[asset["state"]] = counts.get(asset["state"], 0) + 1
    return f"{len(assets)}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _faults(assets: list[dict[str, Any]]) -> list[str]:
    """One line for each of the first assets that have an error."""
    faults = [f"{asset['asset']}: {asset['error']}" for asset in assets if asset["error"]]
    lines = [" " * 11 + shorten(fault, LINE_CHARACTERS - 11) for fault in faults[:FAULTS_SHOWN]]
    return lines if len(faults) <= FAULTS_SHOWN else [*lines, " " * 11 + f"and {len(faults) - FAULTS_SHOWN} more"]


def _models(models: list[dict[str, Any]], url: str) -> str:
    place = f" at {url}" if url else ""
    shown = [model for model in models if model["state"] != "unloaded"]
    if not shown:
        return "none loaded" + place
    return ", ".join(f"{model['name']}{_version(model)} {model['state']}" for model in shown) + place


def _version(model: dict[str, Any]) -> str:
    versions = ", ".join(str(number) for number in model["versions"])
    return f" v{versions}" if versions else ""


def _telemetry(telemetry: dict[str, Any]) -> str:
    if not telemetry.get("enabled"):
        return "off (no broker configured)"
    link = "connected to" if telemetry.get("connected") else "NOT connected to"
    return f"{link} {telemetry.get('broker')}, {telemetry.get('queued_rows', 0)} rows wait"
