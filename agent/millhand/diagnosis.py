"""What `millhand check` looks at: each finding is ok, a warning or an error, with a remedy."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from millhand.errors import ControlError, MillhandError

if TYPE_CHECKING:
    from millhand.config import Config

Level = Literal["ok", "warning", "error"]
FREE_BYTES_WARNING = 1 << 30
CLOCK_FLOOR_S = 1_700_000_000  # any clock before November 2023 was never set
CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One line of `check`."""

    name: str
    level: Level
    message: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def diagnose(config_path: Path | None) -> list[Finding]:
    """Run every check. One that fails itself becomes a finding; none hides another."""
    from millhand.config import load_config

    try:
        config = load_config(config_path)
    except MillhandError as error:
        return [_of_error("config", error)]
    findings = [Finding("config", "ok", f"valid, {len(config.assets)} assets")]
    checks: list[Callable[[Config], Iterator[Finding]]] = [
        _folders, _clock, _hardware, _plugins, _models, _broker, _daemon,
    ]  # fmt: skip
    for check in checks:
        try:
            findings += check(config)
        except MillhandError as error:
            findings.append(_of_error(check.__name__.strip("_"), error))
    return findings


def _of_error(name: str, error: MillhandError) -> Finding:
    return Finding(name, "error", error.message, error.hint)


def _folders(config: Config) -> Iterator[Finding]:
    for key in ("data_dir", "run_dir"):
        folder: Path = getattr(config.node, key)
        place = _nearest(folder)
        if not os.access(place, os.W_OK):
            yield Finding(key, "error", f"'{folder}' cannot be written", f"set [node] {key}, or give '{place}' to us")
            continue
        free = shutil.disk_usage(place).free
        if free < FREE_BYTES_WARNING:
            hint = "free some space; the store drops the oldest readings when the disk is full"
            yield Finding(key, "warning", f"'{folder}' has only {free >> 20} MiB left", hint)
        else:
            yield Finding(key, "ok", f"'{folder}', {free >> 30} GiB free")


def _nearest(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _clock(config: Config) -> Iterator[Finding]:
    if time.time() < CLOCK_FLOOR_S:
        hint = "set the time (timedatectl set-ntp true); predictions go on meanwhile, on the monotonic clock"
        yield Finding("clock", "warning", f"the wall clock says {time.strftime('%Y-%m-%d', time.gmtime())}", hint)
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()))


def _hardware(config: Config) -> Iterator[Finding]:
    from millhand.hardware import discover
    from millhand.profiles import load_profiles, match, profile_folders

    hardware = discover(config.node.hardware_root)
    for problem in hardware.problems:
        yield Finding("hardware", "warning", f"{problem.source}: {problem.message}", problem.hint)
    found = match(load_profiles(profile_folders(config)), hardware)
    yield Finding("profile", "ok", f"{found.profile.name}: {found.reasons[0] if found.reasons else 'matched'}")


def _plugins(config: Config) -> Iterator[Finding]:
    from millhand.assets import adapter_kinds, asset_options
    from millhand.registry import Registry

    registry = Registry()
    registry.load(config.plugin_tables())
    kinds = adapter_kinds(registry)
    for plugin in registry.plugins.values():
        if plugin.state in ("failed", "degraded"):
            yield Finding(f"plugin {plugin.name}", "error", plugin.error, plugin.hint)
        else:
            yield Finding(f"plugin {plugin.name}", "ok", plugin.state)
    for asset in config.assets:
        try:
            asset_options(asset, kinds)
            yield Finding(f"asset {asset.name}", "ok", f"adapter {asset.adapter}, models {list(asset.models)}")
        except MillhandError as error:
            yield _of_error(f"asset {asset.name}", error)


def _models(config: Config) -> Iterator[Finding]:
    from millhand.registry import Registry
    from millhand.serving.repository import Repository

    registry = Registry()
    registry.load(config.plugin_tables())
    folders = [Path(folder) for _, folder in registry.collect("millhand_models")]
    repository = Repository.from_settings(config.models, folders)
    for name, message in repository.problems():
        yield Finding(f"model {name}", "error", message, "mend or remove the model's folder")
    known = repository.names()
    for name in sorted({model for asset in config.assets for model in asset.models}):
        if name in known:
            yield Finding(f"model {name}", "ok", "in the repository")
        else:
            hint = "name the plugin that ships it under [plugins], or add its folder to [models] paths"
            yield Finding(f"model {name}", "error", f"no model is called '{name}'", hint)


def _broker(config: Config) -> Iterator[Finding]:
    if not config.telemetry.enabled:
        yield Finding("broker", "warning", "no broker is configured: nothing reaches a hub", "set [telemetry] brokers")
        return
    for url in config.telemetry.brokers:
        parts = urlsplit(url)
        address = (parts.hostname or "", parts.port or (8883 if parts.scheme == "mqtts" else 1883))
        try:
            with socket.create_connection(address, CONNECT_TIMEOUT_S):
                yield Finding("broker", "ok", f"{parts.hostname}:{address[1]} answers")
        except OSError as error:
            hint = "check address, cable and firewall; readings wait in the store meanwhile"
            yield Finding("broker", "warning", f"{parts.hostname}:{address[1]}: {error.strerror or error}", hint)


def _daemon(config: Config) -> Iterator[Finding]:
    from millhand.control import ControlClient

    try:
        state: dict[str, Any] = ControlClient(config.node.control_path, 5.0).call("state")
    except ControlError as error:
        yield Finding("daemon", "warning", error.message, error.hint)
        return
    yield Finding("daemon", "ok", f"runs since {state['uptime_s']:.0f} s, process {state['pid']}")
    for asset in state["assets"]:
        if asset["error"]:
            # A machine that is switched off is no fault of the node.
            level: Level = "warning" if asset["state"] == "silent" else "error"
            yield Finding(f"asset {asset['asset']}", level, asset["error"], asset["hint"])
    for model in state["models"]:
        if model["state"] == "failed":
            yield Finding(f"model {model['name']}", "error", str(model.get("reason")), "millhand model show")
