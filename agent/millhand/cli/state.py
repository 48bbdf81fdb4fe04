"""Bare `millhand`: the node's state in five lines, and the next step."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from millhand.cli.output import LINE_CHARACTERS, Output, plural, shorten, wrapped
from millhand.errors import ControlError
from millhand.owner import start_command

FAULTS_SHOWN = 3
SILENCE_SHOWN_S = 3.0
"""A hub acknowledges after each of its commits: some tens of milliseconds, by default."""


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
        served = assets or config.models.paths or config.models.load
        step = start_command(config.node.data_dir) if served else "millhand demo"
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
        f"Models     {_models(state['models'], state['http'], state['grpc'])}",
        *_broken(state["self_test"]),
        *_language(state["language"]),
        *([f"Gateway    {state['gateway']}/v1"] if state.get("gateway") else []),
        f"Alerts     {alerts['open']} open, {alerts['acked']} acknowledged; {state['orders']} work orders"
        + _revision(state["revision"]),
        f"Telemetry  {telemetry_text(telemetry)}",
        f"Next step  {state['next_step']}",
    ]
    return [part for line in lines for part in wrapped(line, rest=" " * 11)]


def _revision(revision: dict[str, Any]) -> str:
    """What the reviser made of orders since the start, and what holds it up; nothing where there is none."""
    if not revision["reviser"]:
        return ""
    stands = sum(count for outcome, count in revision["outcomes"].items() if outcome not in ("revised", "unchanged"))
    text = f", {revision['outcomes']['revised']} made better" + (f", {stands} left as they were" if stands else "")
    return text + (f" ({revision['error']})" if revision["error"] else "")


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


def _language(language: dict[str, Any]) -> list[str]:
    """One line where a language model is configured, and one for what is wrong with it."""
    if language["state"] == "off":
        return []
    server = f" on {language['server']}" if language["server"] else ""
    lines = [f"Language   {language['name']}{server}: {language['state']}"]
    if language["reason"] and language["state"] != "ready":
        lines.append(" " * 11 + shorten(language["reason"], LINE_CHARACTERS - 11))
    return lines


def _broken(tried: list[dict[str, Any]]) -> list[str]:
    """One line for each part of a backend that the self-test found not to work."""
    faults = [f"{one['backend']} '{one['part']}' {one['message']}" for one in tried if not one["works"]]
    return [" " * 11 + shorten(fault, LINE_CHARACTERS - 11) for fault in faults[:FAULTS_SHOWN]]


def _models(models: list[dict[str, Any]], url: str, grpc_address: str) -> str:
    places = [place for place in (url, grpc_address and f"gRPC {grpc_address}") if place]
    place = f" at {' and '.join(places)}" if places else ""
    shown = [model for model in models if model["state"] != "unloaded"]
    if not shown:
        return "none loaded" + place
    return ", ".join(f"{model['name']}{_version(model)} {model['state']}" for model in shown) + place


def _version(model: dict[str, Any]) -> str:
    versions = ", ".join(str(number) for number in model["versions"])
    return f" v{versions}" if versions else ""


def telemetry_text(telemetry: dict[str, Any]) -> str:
    """The connection, a hub that does not answer, the queue."""
    if not telemetry.get("enabled"):
        return "off (no broker configured)"
    link = "connected to" if telemetry["connected"] else "NOT connected to"
    hub = hub_fault(telemetry)
    return f"{link} {telemetry['broker']}, {f'{hub}, ' if hub else ''}{plural(telemetry['queued_rows'], 'row')} wait"


def hub_fault(telemetry: dict[str, Any]) -> str:
    """What is known of a hub that does not answer, before the publisher's own patience ends; "" for nothing."""
    if telemetry["hosts_offline"]:
        return f"hub {' and '.join(telemetry['hosts_offline'])} is offline"
    silent_s = telemetry["hub_silent_s"] or 0.0
    if silent_s < SILENCE_SHOWN_S:
        return ""
    return f"hub silent since {datetime.fromtimestamp(time.time() - silent_s, UTC):%H:%M:%SZ}"
