"""What `millhand check` looks at on the language side: server, memory, gateway, guards; and how a daemon stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from millhand.errors import MillhandError
from millhand.findings import Finding, Level, mib

if TYPE_CHECKING:
    from millhand.config import Config

STATES: Mapping[str, Level] = {"ready": "ok", "starting": "warning", "restarting": "warning", "failed": "error"}


def language_findings(config: Config) -> Iterator[Finding]:
    """Which server would serve the language model, and why; whether it fits. Nothing is started."""
    from millhand.hardware.visible import find_device
    from millhand.language.plan import plan_of

    if not config.language.model:
        return
    hardware, match, plan = plan_of(config)
    processes = f"{len(plan.launches)} processes" if len(plan.launches) > 1 else "1 process"
    spread = f" on {len(plan.head.accelerators)} GPUs each" if len(plan.head.accelerators) > 1 else ""
    text = f"'{plan.model.name}' in {processes}{spread}; {'; '.join(plan.reasons)}"
    yield Finding("language", "ok", text)
    device = plan.head.accelerators[0] if plan.head.accelerators else "cpu"
    budget = match.profile.budget_bytes(hardware, find_device(hardware, device))
    room = None if budget is None else budget * max(1, len(plan.head.accelerators))
    weights = plan.model.weights_bytes * (1 if plan.head.accelerators else len(plan.launches))
    cache = plan.model.manifest.kv_bytes(plan.head.context_tokens, plan.head.kv_bits)
    if room is not None and weights + cache > room:
        text = (
            f"its weights take {mib(weights)} and one conversation {mib(cache)}; "
            f"models may take {mib(room)} of '{device}'"
        )
        yield Finding("language memory", "error", text, "take a smaller model or precision: millhand model catalog")


def gateway_findings(config: Config) -> Iterator[Finding]:
    """Whether the gateway can serve, who may ask, and which guards stand before the model; each is made, not used."""
    if config.language.model and config.gateway.enabled == "auto" and not config.serves_gateway:
        hint = "pip install 'millhand[gateway]', or set [gateway] enabled = false"
        yield Finding("gateway", "warning", "off: the package aiohttp is not installed", hint)
    if config.serves_gateway:
        yield from _tokens(config)
        yield _guards(config)


def _guards(config: Config) -> Finding:
    from millhand.registry import Registry

    registry, tables = Registry(), config.plugin_tables()
    registry.load(tables)
    names = [guard.name for _, guard in registry.collect("millhand_guards")]
    faults = [
        f"plugin '{name}': {plugin.error}"
        for name, plugin in registry.plugins.items()
        if plugin.error and "millhand_guards" in plugin.hooks
    ]
    if names and not faults:
        return Finding("guards", "ok", ", ".join(names))
    hint = "see [plugins.guard]; without guards every text goes to the model and back as it is"
    return Finding("guards", "warning", "; ".join(faults) or "none stands before the language model", hint)


def _tokens(config: Config) -> Iterator[Finding]:
    """The file whose tokens let clients ask the language model."""
    from millhand.serving.openai.tokens import read_tokens

    path, key = config.gateway.tokens_file, "gateway tokens_file"
    if path is None:
        return
    try:
        count = len(read_tokens(path))
    except MillhandError as error:
        yield Finding(key, "error", error.message, error.hint)
        return
    if count:
        yield Finding(key, "ok", f"'{path}' holds {count} tokens")
    else:
        yield Finding(key, "warning", f"'{path}' is empty: nobody may ask", "millhand gateway token NAME")


def server_finding(shown: Mapping[str, Any]) -> Finding:
    """How the running daemon's language servers stand, by what `language.show` tells."""
    ready = sum(replica["state"] == "ready" for replica in shown["replicas"])
    text = f"'{shown['name']}' is {shown['state']}"
    if shown["replicas"]:
        text += f", {ready} of {len(shown['replicas'])} processes ready"
    if shown["reason"]:
        text += f": {shown['reason']}"
    level = STATES.get(shown["state"], "warning")
    if level == "ok" and ready < len(shown["replicas"]):
        level = "warning"
    return Finding("language server", level, text, shown["hint"] or "millhand language show")
