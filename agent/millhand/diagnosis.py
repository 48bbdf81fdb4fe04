"""What `millhand check` looks at: each finding is ok, a warning or an error, with a remedy."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from millhand import __version__
from millhand.clock import is_synchronised
from millhand.errors import ConfigError, ControlError, MillhandError
from millhand.findings import Finding, Level, mib, of_error
from millhand.owner import strays

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.control import ControlClient
    from millhand.hardware.facts import Hardware
    from millhand.profiles import Match
    from millhand.serving.settings import GrpcSettings, HttpSettings

FREE_BYTES_WARNING = 1 << 30
CLOCK_FLOOR_S = 1_700_000_000  # any clock before November 2023 was never set
CLOCK_CAP_S = 1 << 31  # nor is one after January 2038 right, in this version's life
NAMES_OF_ANY_HOST = ("localhost", "node")  # the second is taken where a host has no name
CONNECT_TIMEOUT_S = 3.0
STRAYS_SHOWN = 3
REMEDIES = {
    "reload": "systemctl reload millhand; without systemd: kill -HUP {pid}",
    "restart": "systemctl restart millhand; without systemd: kill {pid}, and start it again",
}


def diagnose(config_path: Path | None) -> list[Finding]:
    """Run every check. One that fails itself becomes a finding; none hides another."""
    from millhand.config import load_config

    try:
        config = load_config(config_path)
    except MillhandError as error:
        return [of_error("config", error)]
    findings = [Finding("config", "ok", f"valid, {len(config.assets)} assets")]
    checks: list[Callable[[Config], Iterator[Finding]]] = [
        _identity, _folders, _clock, _hardware, _plugins, _pack, _keys, _models, _worker, _backends, _language,
        _gateway, _orders, _tokens, _tracing, _listeners, _broker, _daemon,
    ]  # fmt: skip
    for check in checks:
        try:
            findings += check(config)
        except MillhandError as error:
            findings.append(of_error(check.__name__.strip("_"), error))
    return _merged(findings)


def _merged(findings: list[Finding]) -> list[Finding]:
    """One finding an asset and a model: what the files say and what the daemon says of it."""
    merged: dict[str, Finding] = {}
    for index, finding in enumerate(findings):
        of_one = finding.name.startswith(("asset ", "model "))
        key = finding.name if of_one else f"{index}"
        merged[key] = _both(merged[key], finding) if key in merged else finding
    return list(merged.values())


def _both(first: Finding, second: Finding) -> Finding:
    if "ok" in (first.level, second.level) or first.message == second.message:
        return first if second.level == "ok" else second
    level: Level = "error" if "error" in (first.level, second.level) else "warning"
    return Finding(first.name, level, f"{first.message}; {second.message}", first.hint or second.hint)


def _identity(config: Config) -> Iterator[Finding]:
    """Two nodes of one name are one at the hub."""
    name = config.node.id
    if name in NAMES_OF_ANY_HOST and config.telemetry.enabled:
        hint = "name it: [node] id (millhand setup asks for it), or name the host (hostnamectl set-hostname NAME)"
        yield Finding("id", "warning", f"this node is called '{name}' at the hub; other hosts have that name too", hint)


def _folders(config: Config) -> Iterator[Finding]:
    for key in ("data_dir", "run_dir"):
        folder: Path = getattr(config.node, key)
        place = _nearest(folder)
        if not os.access(place, os.W_OK):
            yield Finding(key, "error", f"'{folder}' cannot be written", f"set [node] {key}, or give '{place}' to us")
            continue
        if found := strays(folder):
            owner = folder.stat()
            text = f"'{folder}' holds what another user owns: {', '.join(found[:STRAYS_SHOWN])}"
            hint = f"stop the agent, then: chown -R {owner.st_uid}:{owner.st_gid} '{folder}'"
            yield Finding(key, "warning", text, hint)
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
    if not CLOCK_FLOOR_S <= time.time() < CLOCK_CAP_S:
        hint = "set the time (timedatectl set-ntp true); predictions go on meanwhile, on the monotonic clock"
        yield Finding("clock", "warning", f"the wall clock says {time.strftime('%Y-%m-%d', time.gmtime())}", hint)
        return
    now = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
    if is_synchronised() is False:
        hint = "set up NTP (timedatectl set-ntp true), or the plant's time server; times at the hub are off until then"
        yield Finding("clock", "warning", f"{now}, but nothing keeps it in step", hint)
    else:
        yield Finding("clock", "ok", now)


def _hardware(config: Config) -> Iterator[Finding]:
    from millhand.profiles import match_node

    hardware, found = match_node(config)
    for problem in hardware.problems:
        yield Finding("hardware", "warning", f"{problem.source}: {problem.message}", problem.hint)
    yield Finding("profile", "ok", found.reasons[0])
    if not hardware.accelerators:
        yield Finding("gpu", "ok", "no GPU is seen: models run on the CPU")
    for problem in found.profile.limits.problems(hardware):
        yield Finding("temperature", "warning", f"{problem.field} is at {problem.message}", problem.hint)
    yield _memory(config, hardware, found)


def _memory(config: Config, hardware: Hardware, found: Match) -> Finding:
    """Whether the models fit the first worker's device, which holds them; each takes at least its file's size."""
    from millhand.hardware.visible import find_device
    from millhand.serving.diagnosis import loaded

    device = found.worker.accelerator
    budget = found.profile.budget_bytes(hardware, find_device(hardware, device))
    if budget is None:
        return Finding("memory", "warning", f"the memory of '{device}' is not known", "millhand hw show")
    wanted = sum(folder.size_bytes(version) for folder, version in loaded(config))
    text = f"models may take {mib(budget)} of '{device}'; their files take {mib(wanted)}"
    if wanted > budget:
        return Finding("memory", "error", text, "serve fewer or smaller models, or free memory on the node")
    return Finding("memory", "ok", text)


def _plugins(config: Config) -> Iterator[Finding]:
    from millhand.assets import adapter_kinds, asset_options
    from millhand.registry import Registry
    from millhand.serving.diagnosis import repository_of

    registry = Registry()
    registry.load(config.plugin_tables())
    kinds, models = adapter_kinds(registry), repository_of(config).models
    for plugin in registry.plugins.values():
        if plugin.state in ("failed", "degraded"):
            yield Finding(f"plugin {plugin.name}", "error", plugin.error, plugin.hint)
        else:
            yield Finding(f"plugin {plugin.name}", "ok", plugin.state)
    for asset in config.assets:
        try:
            asset_options(asset, kinds)
            unknown = [name for name in asset.models if name not in models]
            if unknown:
                hint = "name the plugin that ships it under [plugins], or add its folder to [models] paths"
                yield Finding(f"asset {asset.name}", "error", f"no model is called '{unknown[0]}'", hint)
                continue
            yield Finding(
                f"asset {asset.name}", "ok", f"adapter {asset.adapter}, models: {', '.join(asset.models) or 'none'}"
            )
        except MillhandError as error:
            yield of_error(f"asset {asset.name}", error)


def _pack(config: Config) -> Iterator[Finding]:
    """Whether the domain pack can be read; nothing to say where the owner named none and it can."""
    from millhand.language.pack import PackSettings, find_pack

    pack = find_pack(config.pack)
    if config.pack != PackSettings():
        yield Finding("pack", "ok", f"{pack.name}: {pack.manifest.title}")


def _keys(config: Config) -> Iterator[Finding]:
    """The keys whose signatures of proofs count; nothing to say where there are none."""
    from millhand.proof.signature import Keyring

    keys, faults = Keyring(config.node.data_dir, config.models.trusted_keys).read()
    yield from (of_error("keys", fault) for fault in faults)
    if keys and not faults:
        yield Finding("keys", "ok", f"signatures by {', '.join(keys)} count")


def _models(config: Config) -> Iterator[Finding]:
    from millhand.serving.diagnosis import model_findings

    yield from model_findings(config)


def _worker(config: Config) -> Iterator[Finding]:
    from millhand.serving.diagnosis import worker_findings

    yield from worker_findings(config)


def _backends(config: Config) -> Iterator[Finding]:
    from millhand.serving.diagnosis import backend_findings

    yield from backend_findings(config)


def _language(config: Config) -> Iterator[Finding]:
    from millhand.language.diagnosis import language_findings

    yield from language_findings(config)


def _gateway(config: Config) -> Iterator[Finding]:
    from millhand.language.diagnosis import gateway_findings

    yield from gateway_findings(config)


def _orders(config: Config) -> Iterator[Finding]:
    from millhand.order_rules import order_problems

    yield from (of_error("orders", error) for error in order_problems(config))


def _tokens(config: Config) -> Iterator[Finding]:
    """The files whose tokens let clients manage models."""
    from millhand.serving.admin import AdminToken

    for name, settings in _fronts(config).items():
        if settings.admin_token_file is not None:
            key = f"{name} admin_token_file"
            try:
                AdminToken(settings.admin_token_file, name).read()
                yield Finding(key, "ok", f"'{settings.admin_token_file}' holds a token")
            except MillhandError as error:
                yield of_error(key, error)


def _tracing(config: Config) -> Iterator[Finding]:
    from millhand.serving.tracing import require_exporter

    if config.tracing.enabled and _fronts(config):
        require_exporter()
        yield Finding("tracing", "ok", f"traces go to {config.tracing.endpoint}")


def _fronts(config: Config) -> dict[str, HttpSettings | GrpcSettings]:
    """What listens, by its table."""
    tables: dict[str, HttpSettings | GrpcSettings] = {"http": config.http, "grpc": config.grpc}
    return {name: settings for name, settings in tables.items() if settings.enabled}


def _listeners(config: Config) -> Iterator[Finding]:
    """Whether the ports are ours to take. A running daemon holds them itself, which `_daemon` tells of."""
    from millhand.control import ControlClient

    listening: dict[str, tuple[str, int]] = {name: (one.host, one.port) for name, one in _fronts(config).items()}
    if config.serves_gateway:
        listening["gateway"] = config.gateway.host, config.gateway.port
    wanted = {name: (host, port) for name, (host, port) in listening.items() if port}
    try:
        if wanted:
            ControlClient(config.node.control_path, 5.0).call("asset.list")
        return
    except ControlError:
        pass
    for name, (host, port) in wanted.items():
        yield _listener(name, host, port)


def _listener(name: str, host: str, port: int) -> Finding:
    from millhand.serving.front import bind_hint

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the daemon binds: connections of an earlier run that wind down are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return Finding(name, "ok", f"{host}:{port} is free")
    except OSError as error:
        return Finding(name, "error", f"{host}:{port}: {error.strerror or error}", bind_hint(name, error))


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
    yield from _not_taken_up(state, ControlClient(config.node.control_path, 5.0))
    here = {asset.name for asset in config.assets}  # the daemon may run another configuration
    for asset in state["assets"]:
        if asset["error"] and asset["asset"] in here:
            # A machine that is switched off is no fault of the node.
            level: Level = "warning" if asset["state"] == "silent" else "error"
            yield Finding(f"asset {asset['asset']}", level, asset["error"], asset["hint"])
    if config.language.model:
        from millhand.language.diagnosis import server_finding

        yield server_finding(ControlClient(config.node.control_path, 5.0).call("language.show"))
    for model in state["models"]:
        if model["state"] == "failed":
            yield Finding(f"model {model['name']}", "error", model["reason"], model["hint"])
        for missed in model.get("missed", ()):
            yield Finding(f"model {model['name']}", "warning", missed["reason"], missed["hint"])


def _not_taken_up(state: Mapping[str, Any], daemon: ControlClient) -> Iterator[Finding]:
    """What the daemon does not go by yet; all else is said of the configuration, and of what is installed, now."""
    if state["version"] != __version__:
        message = f"it runs version {state['version']}, installed is {__version__}"
        yield Finding("daemon", "warning", message, REMEDIES["restart"].format(**state))
        return
    try:
        changes = daemon.call("config.changes")
    except ConfigError as error:  # of the file that it was started with, which may be another one
        yield Finding("daemon", "warning", f"it cannot read its configuration again: {error.message}", error.hint)
        return
    for step, sections in changes.items():
        if sections:
            message = f"it does not go yet by what the configuration says now: {', '.join(sections)}"
            yield Finding("daemon", "warning", message, REMEDIES[step].format(**state))
