"""The calls that the control socket answers: what CLI, page and HTTP process may ask of the daemon."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from millhand import __version__
from millhand.conversation_calls import ConversationCalls
from millhand.errors import InputError, suggestion
from millhand.ids import ID_SEARCH_LIMIT, by_prefix
from millhand.metrics import DAEMON, PAGES
from millhand.order_calls import OrderCalls
from millhand.records import Alert, AlertState
from millhand.serving.front_metrics import FrontMetrics
from millhand.store.rows import STREAMS, Bulk, Gap, Row
from millhand.store.store import END_NS

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.daemon import Daemon
    from millhand.hardware import Hardware
    from millhand.pipeline.asset import Latency

TAIL_ROWS = 256


class Calls:
    """Answers for one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._fronts = FrontMetrics()

    def handlers(self) -> dict[str, Handler]:
        return {
            "state": self.state,
            "reload": self.reload,
            "config.changes": self.config_changes,
            "metrics": self.metrics,
            "metrics.report": self.metrics_report,
            "asset.list": self.asset_list,
            "asset.latencies": self.asset_latencies,
            "alert.list": self.alert_list,
            "alert.ack": self.alert_ack,
            **OrderCalls(self._daemon.store).handlers(),
            **self._conversations().handlers(),
            **self._daemon.language.knowledge.handlers(),
            "prediction.list": self.prediction_list,
            "plugin.list": self.plugin_list,
            "readings.export": self.readings_export,
            "store.export": self.store_export,
            "waveform.show": self.waveform_show,
            "hardware": self.hardware,
            "telemetry.status": self.telemetry_status,
            "telemetry.tail": self.telemetry_tail,
            **self._daemon.pool.control_handlers(),
            "language.show": self.language_show,
            "language.routes": self.language_routes,
            "language.restart": self.language_restart,
            "language.complete": self.language_complete,
            "model.load": self._daemon.load_model,
            "model.recorded": self.model_recorded,
            "model.forget": self.model_forget,
        }

    def _conversations(self) -> ConversationCalls:
        daemon = self._daemon
        return ConversationCalls(
            daemon.store, daemon.language.asking, lambda: [asset.name for asset in daemon.config.assets]
        )

    async def state(self) -> dict[str, Any]:
        """Everything that bare `millhand` shows."""
        daemon = self._daemon
        alerts = await daemon.store.alerts(limit=ID_SEARCH_LIMIT)
        assets, models, language = daemon.fleet.statuses(), daemon.pool.index(), daemon.language
        opened = sum(alert.state is AlertState.OPEN for alert in alerts)
        return {
            "ready": daemon.ready,
            "version": __version__,
            "pid": os.getpid(),
            "node": daemon.config.node.id,
            "group": daemon.config.node.group,
            "profile": daemon.match.profile.name,
            "uptime_s": time.monotonic() - daemon.started_monotonic,
            "assets": assets,
            "models": models,
            "language": language.servers.show(),
            "self_test": [tried.to_dict() for tried in daemon.self_test.tried],
            "http": daemon.http_url,
            "grpc": daemon.grpc_address,
            "gateway": language.gateway_url,
            "alerts": {"open": opened, "acked": sum(alert.state is AlertState.ACKED for alert in alerts)},
            "orders": len(await daemon.store.orders(limit=ID_SEARCH_LIMIT)),
            "revision": language.revision.status(),
            "telemetry": await self.telemetry_status(),
            "sinks": daemon.fleet.sink_statuses(),
            "store": await daemon.store.status(),
            "next_step": _next_step(assets, models, opened, language.servers.state, daemon.config.telemetry.enabled),
        }

    async def reload(self) -> dict[str, Any]:
        return {"needs_restart": await self._daemon.reload()}

    async def config_changes(self) -> dict[str, list[str]]:
        """What of the configuration waits for a reload and for a restart. Raises ConfigError."""
        return self._daemon.config_changes()._asdict()

    async def metrics(self, names: str = "", front: dict[str, Any] | None = None) -> str:
        """The text of /metrics; with names "triton" or "vllm" as those have them. Raises InputError for other names.

        front: the newest report of the process that asks (see serving/front_metrics.py).
        """
        if names not in PAGES:
            raise InputError(
                f"metrics: names = '{names}' is not known{suggestion(names, PAGES)}",
                hint=f"leave it out, or ask for one of: {', '.join(filter(None, PAGES))}",
            )
        if front is not None:
            self._fronts.take(front)
        await self._daemon.metrics.refresh()
        return DAEMON.render(names) + self._fronts.render(names)

    async def metrics_report(self, front: dict[str, Any]) -> None:
        """Take what a front process has counted."""
        self._fronts.take(front)

    async def asset_list(self) -> list[dict[str, Any]]:
        return self._daemon.fleet.statuses()

    async def asset_latencies(self, asset: str) -> list[Latency]:
        """(window end, monotonic time of the commit, latency in ms) of the asset's last predictions."""
        return self._daemon.fleet.latencies(asset)

    async def language_show(self) -> dict[str, Any]:
        """`LanguageServers.show`."""
        return self._daemon.language.servers.show()

    def language_routes(self) -> AsyncIterator[dict[str, Any]]:
        """A stream: what another process needs to reach the language servers itself, now and after every change."""
        return self._daemon.language.servers.watch_routes()

    async def language_restart(self, replica: str = "") -> list[str]:
        """`LanguageServers.restart`."""
        return await self._daemon.language.servers.restart(replica)

    async def language_complete(
        self,
        messages: list[dict[str, str]],
        schema: dict[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """One completion of the agent's own, guarded where there is a gateway; as `hookspecs.Complete`."""
        complete = self._daemon.language.complete()
        return await complete(messages, schema=schema, max_tokens=max_tokens, temperature=temperature, seed=seed)

    async def alert_list(
        self, state: str | None = None, asset: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        return [_plain(alert) for alert in await self._daemon.store.alerts(state=state, asset=asset, limit=limit)]

    async def alert_ack(self, alert_id: str, by: str) -> dict[str, Any]:
        alert = by_prefix(await self._daemon.store.alerts(limit=ID_SEARCH_LIMIT), alert_id, "alert")
        acked = await self._daemon.store.ack_alert(alert.id, by, time.time_ns())
        return {**_plain(acked), "already_acked": bool(alert.acked_by)}

    async def prediction_list(
        self,
        asset: str,
        model: str | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
        limit: int = 1000,
    ) -> list[dict[str, Any]]:
        since, until = _span(since_ns, until_ns)
        found = await self._daemon.store.predictions(asset, model, since, until, limit)
        return [_plain(prediction) for prediction in found]

    async def plugin_list(self) -> list[dict[str, Any]]:
        return [plugin.to_dict() for plugin in self._daemon.registry.listing()]

    async def readings_export(
        self,
        asset: str,
        names: list[str] | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
    ) -> AsyncIterator[Any]:
        """Yield (source time, asset, name, value, unit, quality). Raises InputError for an asset or name unknown."""
        await self._check_known(asset, names or [])
        since, until = _span(since_ns, until_ns)
        async for chunk in self._daemon.store.readings(asset, names or None, since, until):
            yield [(r.clock.source_ns, asset, r.name, _finite(r.value), r.unit, r.quality.name.lower()) for r in chunk]

    async def _check_known(self, asset: str, names: list[str]) -> None:
        store = self._daemon.store
        assets = {*await store.assets(), *(settings.name for settings in self._daemon.config.assets)}
        if asset not in assets:
            hint = f"one of: {', '.join(sorted(assets))}" if assets else "no asset has brought a reading yet"
            raise InputError(f"asset '{asset}' is not known{suggestion(asset, assets)}", hint=hint)
        known = [spec.name for spec in await store.metric_specs() if spec.asset == asset]
        unknown = [name for name in names if name not in known]
        if known and unknown:  # an asset that has not spoken yet may still bring it
            raise InputError(
                f"asset '{asset}' has no reading '{unknown[0]}'{suggestion(unknown[0], known)}",
                hint=f"one of: {', '.join(sorted(known))}",
            )

    async def store_export(self, path: str, since_ns: int | None = None, until_ns: int | None = None) -> dict[str, int]:
        """Write everything into a new plain SQLite file at `path`; returns the rows a table."""
        from millhand.store.export import export

        return await export(self._daemon.store, Path(path), *_span(since_ns, until_ns))

    async def waveform_show(self, asset: str, name: str) -> dict[str, Any]:
        """The newest snapshot, its samples as numbers in `unit`."""
        waveform = await self._daemon.store.waveform(asset, name)
        if waveform is None:
            raise InputError(f"asset '{asset}' has no waveform '{name}'", hint="wait for a snapshot, or mend the name")
        return {
            "name": name,
            "unit": waveform.unit,
            "sample_rate_hz": waveform.sample_rate_hz,
            "source_ns": waveform.clock.source_ns,
            "samples": waveform.array.tolist(),
        }

    async def model_recorded(self, model: str) -> dict[str, Any]:
        """`Recorder.facts`. Raises ModelError for a model that is not known and of which nothing was recorded."""
        facts = await self._daemon.recorder.facts(model)
        if not facts["rows"]:
            self._daemon.pool.manifest(model)
        return facts

    async def model_forget(self, model: str) -> dict[str, Any]:
        """Delete what is recorded of a model. Raises as `model_recorded`."""
        await self._daemon.recorder.forget(model)
        return await self.model_recorded(model)

    async def hardware(self) -> list[tuple[str, str]]:
        """Rows of name and value for people; `millhand hw show` tells more."""
        daemon = self._daemon
        return [*_hardware_rows(daemon.hardware), ("Profile", daemon.match.reasons[0])]

    async def telemetry_status(self) -> dict[str, Any]:
        publisher = self._daemon.publisher
        if publisher is None:
            return {"enabled": False}
        return {"enabled": True, **await publisher.status()}

    async def telemetry_tail(self, count: int | None = None) -> AsyncIterator[Any]:
        store = self._daemon.store
        seen = {stream: await store.last(stream) for stream in STREAMS}
        sent, version, epoch = 0, 0, store.epoch
        while True:
            if store.epoch != epoch:  # another file: its rows begin at 1
                epoch, seen = store.epoch, dict.fromkeys(STREAMS, 0)
            for stream in STREAMS:
                for row in await store.pending(stream, seen[stream], TAIL_ROWS):
                    seen[stream] = row.seq
                    yield _tail_line(row)
                    sent += 1
                    if count is not None and sent >= count:
                        return
            version = await store.changed.after(version)


def _next_step(
    assets: list[dict[str, Any]], models: list[dict[str, Any]], open_alerts: int, language: str, telemetry: bool
) -> str:
    """What to do next: what is wrong comes first."""
    faults = {
        "millhand check": any(asset["error"] for asset in assets),
        "millhand alert list": bool(open_alerts),
        "millhand model list": any(model["state"] in ("failed", "bad") for model in models),
        "millhand language show": language == "failed",
    }
    if step := next((step for step, wrong in faults.items() if wrong), ""):
        return step
    serving = [model["name"] for model in models if model["versions"]]
    if not assets and serving:
        return f"millhand model show {serving[0]}"  # a node that serves models to others
    if not assets:
        return "add an [[assets]] table to the configuration; 'millhand plugin list' shows adapters"
    return "millhand telemetry status" if telemetry else "set [telemetry] to reach a hub"


def _hardware_rows(hardware: Hardware) -> list[tuple[str, str]]:
    cpu, memory = hardware.cpu, hardware.memory
    rows = [
        ("CPU", f"{cpu.model}, {cpu.logical} logical cores, {', '.join(cpu.instructions) or 'no vector extensions'}")
    ]
    if memory.total_bytes is not None:
        rows.append(("Memory", f"{memory.total_bytes / 2**30:.1f} GiB"))
    if hardware.jetson is not None:
        rows.append(("Jetson", f"{hardware.jetson.module}, L4T {hardware.jetson.l4t}"))
    rows += [("GPU", accelerator.name) for accelerator in hardware.accelerators]
    return rows if hardware.accelerators else [*rows, ("GPU", "none")]


def _span(since_ns: int | None, until_ns: int | None) -> tuple[int, int]:
    return since_ns or 0, END_NS if until_ns is None else until_ns


def _plain(record: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _tail_line(row: Row) -> dict[str, Any]:
    record = row.record()
    if isinstance(record, Bulk):
        text = f"{len(record.readings)} readings, {len(record.predictions)} predictions"
    elif isinstance(record, Gap):
        text = f"gap: {record.stream} {record.first} to {record.last} ({record.reason})"
    elif isinstance(record, Alert):
        text = f"alert {record.kind} {record.state}: {record.message}"
    else:
        text = f"work order: {record.symptom}"
    return {"stream": row.stream, "seq": row.seq, "asset": row.asset, "created_ns": row.created_ns, "text": text}
