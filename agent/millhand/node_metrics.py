"""The node's own metrics, taken from what its parts count; docs/metrics.md lists them.

Everything is taken when /metrics is read, so an idle node does nothing for them. Labels hold names that the
configuration or the code gives (assets, models, sinks, streams, reasons), so the number of series is bounded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from millhand.errors import MillhandError
from millhand.hardware.telemetry import Sampler
from millhand.metrics import DAEMON, Counter, Family, Gauge, number

if TYPE_CHECKING:
    from millhand.daemon import Daemon

KEEPER = "keeper"
"""The process that holds a language server, which is its child."""
STORE_DEADLINE_S = 2.0
"""A store that does not answer in time leaves its last values standing: /metrics must not hang with a disk."""

_ASSET = ["asset"]
_STREAM = ["stream"]

START_TIME = Gauge(DAEMON, "millhand_start_time_seconds", "When the daemon started, Unix time.")
MEMORY = Gauge(DAEMON, "millhand_process_resident_memory_bytes", "Resident memory, summed by kind.", ["process"])
ASSETS = Gauge(DAEMON, "millhand_assets", "Assets by what their runner does.", ["state"])
PLUGINS = Gauge(DAEMON, "millhand_plugins", "Plugins by state.", ["state"])

LAST_BATCH_AGE = Gauge(DAEMON, "millhand_asset_last_batch_age_seconds", "Time since the asset's last batch.", _ASSET)
RESTARTS = Counter(DAEMON, "millhand_adapter_restarts_total", "Times that reading the asset failed.", _ASSET)
WINDOWS_LEFT_OUT = Counter(
    DAEMON,
    "millhand_window_readings_left_out_total",
    "Readings and snapshots left out of a model's windows, and windows begun anew (gaps, clock_resets).",
    ["asset", "model", "reason"],
)
PIPELINE = {
    "batches": Counter(DAEMON, "millhand_batches_total", "Batches committed.", _ASSET),
    "readings": Counter(DAEMON, "millhand_readings_total", "Readings committed.", _ASSET),
    "predictions": Counter(DAEMON, "millhand_predictions_total", "Predictions committed.", _ASSET),
    "predictions_failed": Counter(
        DAEMON, "millhand_predictions_failed_total", "Windows to which the model gave no answer.", _ASSET
    ),
    "windows_skipped": Counter(
        DAEMON, "millhand_windows_skipped_total", "Windows that an extractor could not judge.", _ASSET
    ),
    "extractor_errors": Counter(
        DAEMON, "millhand_extractor_errors_total", "Windows over which an extractor failed.", _ASSET
    ),
    "alerts": Counter(DAEMON, "millhand_alerts_raised_total", "Alerts raised.", _ASSET),
    "orders_failed": Counter(
        DAEMON, "millhand_orders_failed_total", "Alerts for which the order writer failed.", _ASSET
    ),
}

_LANGUAGE = ["model", "server"]
LANGUAGE_STATE = Gauge(
    DAEMON,
    "millhand_language_server_state",
    "1 for the state that a process of the language model is in.",
    [*_LANGUAGE, "state"],
)
LANGUAGE_RESTARTS = Counter(
    DAEMON,
    "millhand_language_server_restarts_total",
    "Times that a process of the language model was started again.",
    _LANGUAGE,
)
LANGUAGE_NOW = {
    "running": Gauge(
        DAEMON, "millhand_language_server_running", "Requests that the language server is answering.", _LANGUAGE
    ),
    "waiting": Gauge(
        DAEMON, "millhand_language_server_waiting", "Requests that wait in the language server.", _LANGUAGE
    ),
    "kv_used": Gauge(
        DAEMON,
        "millhand_language_server_kv_used_ratio",
        "Share of the language server's KV cache in use, 0 to 1.",
        _LANGUAGE,
        vllm="vllm:kv_cache_usage_perc",
    ),
}
LANGUAGE_TOKENS = {
    "prompt_tokens": Counter(
        DAEMON, "millhand_language_server_prompt_tokens_total", "Tokens that the language server has read.", _LANGUAGE
    ),
    "generated_tokens": Counter(
        DAEMON,
        "millhand_language_server_generated_tokens_total",
        "Tokens that the language server has written.",
        _LANGUAGE,
    ),
}

CONNECTED = Gauge(DAEMON, "millhand_telemetry_connected", "1 while the node is born at a broker.")
QUEUED = Gauge(DAEMON, "millhand_telemetry_queued_rows", "Rows that the hub has not acknowledged, all streams.")
TELEMETRY = {
    "sessions": Counter(DAEMON, "millhand_telemetry_sessions_total", "Sessions with a broker that began."),
    "births": Counter(DAEMON, "millhand_telemetry_births_total", "NBIRTH messages sent."),
    "sent": Counter(DAEMON, "millhand_telemetry_sent_rows_total", "Rows sent, repeats included."),
    "resent": Counter(DAEMON, "millhand_telemetry_resent_rows_total", "Rows that had to be sent again."),
    "acknowledgements": Counter(
        DAEMON, "millhand_telemetry_acknowledgements_total", "Acknowledgements of the hub that moved a stream on."
    ),
}
REVISIONS = Counter(
    DAEMON,
    "millhand_order_revisions_total",
    "Drafts of work orders that were given to the reviser, by what came of it; the draft stands unless `revised`.",
    ["outcome"],
)
STRUCK = Counter(
    DAEMON, "millhand_order_struck_total", "What validation took out of orders that a language model wrote."
)
SINKS = {
    "delivered": Counter(DAEMON, "millhand_sink_delivered_total", "Alerts and orders that the sink took.", ["sink"]),
    "failures": Counter(
        DAEMON, "millhand_sink_failures_total", "Deliveries that failed and are tried again.", ["sink"]
    ),
    "given_up": Counter(DAEMON, "millhand_sink_given_up_total", "Records that the sink gave up on.", ["sink"]),
}

STORE = {
    "file_bytes": Gauge(DAEMON, "millhand_store_file_bytes", "Size of the store's file."),
    "live_bytes": Gauge(DAEMON, "millhand_store_live_bytes", "Part of the file that holds data."),
    "wal_bytes": Gauge(DAEMON, "millhand_store_wal_bytes", "Size of the store's write-ahead log."),
    "free_disk_bytes": Gauge(DAEMON, "millhand_store_free_disk_bytes", "Free space of the store's file system."),
    "seconds_until_full": Gauge(
        DAEMON, "millhand_store_until_full_seconds", "When unsent rows must go if nothing more is acknowledged."
    ),
    "last_commit_age_s": Gauge(DAEMON, "millhand_store_last_commit_age_seconds", "Time since the last commit."),
}
COMMITS = Counter(DAEMON, "millhand_store_commits_total", "Transactions with steps that were committed.")
STORE_UNSENT = Gauge(DAEMON, "millhand_store_unsent_rows", "Rows that the hub has not acknowledged.", _STREAM)
STORE_DROPPED = Counter(
    DAEMON, "millhand_store_dropped_rows_total", "Rows dropped before the hub had them.", ["stream", "reason"]
)


class Sampled(Family):
    """A family whose labels come ready written from the hardware sampler."""

    def __init__(self, name: str, text: str, kind: str = "gauge", plain_kind: str | None = None) -> None:
        self.kind = kind
        super().__init__(DAEMON, name, text, plain_kind=plain_kind)

    def take(self, labels: str, value: float) -> None:
        self._values[(labels,)] = value

    def samples(self, page: str = "") -> Iterable[str]:
        for (labels,), value in sorted(self._values.items()):
            yield f"{self.name}{labels} {number(value)}"


HARDWARE = {
    family.name: family
    for family in (
        Sampled("nv_cpu_utilization", "Load of all CPUs since the last reading, 0 to 1."),
        Sampled("nv_cpu_memory_total_bytes", "Main memory."),
        Sampled("nv_cpu_memory_used_bytes", "Main memory that programs could not have."),
        Sampled("nv_gpu_utilization", "Load of a GPU, 0 to 1."),
        Sampled("nv_gpu_memory_total_bytes", "Memory of a GPU; of a Jetson, all of its memory."),
        Sampled("nv_gpu_memory_used_bytes", "Memory of a GPU that is taken."),
        Sampled("nv_gpu_power_usage", "Power that a GPU draws, in watts; on a Jetson that of the rail that feeds it."),
        Sampled("nv_gpu_power_limit", "Power at which a GPU is held back, in watts."),
        Sampled(
            "nv_energy_consumption", "Energy that a GPU took since the agent's start, in joules.", "counter", "untyped"
        ),
        Sampled("millhand_gpu_temperature_celsius", "Temperature of a GPU."),
        Sampled("millhand_temperature_celsius", "Temperature of a thermal zone."),
        Sampled("millhand_rail_power_watts", "Power on a rail of a Jetson."),
        Sampled("millhand_disk_total_bytes", "Size of the data folder's file system."),
        Sampled("millhand_disk_free_bytes", "Free space of the data folder's file system."),
    )
}


class NodeMetrics:
    """Sets every family above for one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._sampler = Sampler(daemon.config.node.data_dir, daemon.config.node.hardware_root)

    async def refresh(self) -> None:
        """Take what the parts count now."""
        daemon = self._daemon
        START_TIME.set(time.time() - (time.monotonic() - daemon.started_monotonic))
        assets = daemon.fleet.statuses()
        _count_by(ASSETS, (str(status["state"]) for status in assets))
        _count_by(PLUGINS, (plugin.state for plugin in daemon.registry.plugins.values()))
        _take_assets(assets)
        _take_sinks(daemon.fleet.sink_statuses())
        _take_language(daemon.language.servers.show())
        _take_revision(daemon.language.revision.status())
        await asyncio.to_thread(self._take_hardware)
        with suppress(TimeoutError, MillhandError):
            async with asyncio.timeout(STORE_DEADLINE_S):
                _take_store(await daemon.store.status())
                _take_telemetry({} if daemon.publisher is None else await daemon.publisher.status())

    def close(self) -> None:
        self._sampler.close()

    def _take_hardware(self) -> None:
        _take_memory()
        for family in HARDWARE.values():
            family.clear()
        for key, value in self._sampler.sample().items():
            name, brace, labels = key.partition("{")
            HARDWARE[name].take(brace + labels, value)


def _take_assets(assets: Iterable[Mapping[str, Any]]) -> None:
    for family in (LAST_BATCH_AGE, RESTARTS, WINDOWS_LEFT_OUT, *PIPELINE.values()):
        family.clear()
    for status in assets:
        if "counters" not in status:
            continue  # it waits for its plugin, and was never read
        name = status["asset"]
        if status["last_batch_age_s"] is not None:
            LAST_BATCH_AGE.set(status["last_batch_age_s"], asset=name)
        RESTARTS.set_total(status["restarts"], asset=name)
        for key, family in PIPELINE.items():
            family.set_total(status["counters"][key], asset=name)
        for model, reasons in status["windows"].items():
            for reason, count in reasons.items():
                WINDOWS_LEFT_OUT.set_total(count, asset=name, model=model, reason=reason)


def _take_sinks(sinks: Iterable[Mapping[str, Any]]) -> None:
    for key, family in SINKS.items():
        family.clear()
        for status in sinks:
            family.set_total(status[key], sink=status["name"])


def _take_language(shown: Mapping[str, Any]) -> None:
    for family in (LANGUAGE_STATE, LANGUAGE_RESTARTS, *LANGUAGE_NOW.values(), *LANGUAGE_TOKENS.values()):
        family.clear()
    for replica in shown["replicas"]:
        labels, figures = {"model": replica["name"], "server": shown["server"]}, replica["figures"]
        LANGUAGE_STATE.set(1, state=replica["state"], **labels)
        LANGUAGE_RESTARTS.set_total(replica["restarts"], **labels)
        for key, gauge in LANGUAGE_NOW.items():
            if figures[key] is not None:
                gauge.set(figures[key], **labels)
        for key, counter in LANGUAGE_TOKENS.items():
            if figures[key] is not None:
                counter.set_total(figures[key], **labels)


def _take_revision(status: Mapping[str, Any]) -> None:
    for family in (REVISIONS, STRUCK):
        family.clear()
    if status["reviser"]:
        STRUCK.set_total(status["struck"])
        for outcome, count in status["outcomes"].items():
            REVISIONS.set_total(count, outcome=outcome)


def _take_store(status: Mapping[str, Any]) -> None:
    for key, gauge in STORE.items():
        gauge.clear()
        if status[key] is not None:
            gauge.set(status[key])
    COMMITS.set_total(status["commits"])
    for stream, state in status["streams"].items():
        STORE_UNSENT.set(state["unsent"], stream=stream)
        for reason, count in state["dropped"].items():
            STORE_DROPPED.set_total(count, stream=stream, reason=reason)


def _take_telemetry(status: Mapping[str, Any]) -> None:
    for family in (CONNECTED, QUEUED, *TELEMETRY.values()):
        family.clear()
    if status:
        CONNECTED.set(status["connected"])
        QUEUED.set(status["queued_rows"])
        for key, counter in TELEMETRY.items():
            counter.set_total(status[key])


def _count_by(gauge: Gauge, states: Iterable[str]) -> None:
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    gauge.clear()
    for state, count in counts.items():
        gauge.set(count, state=state)


def _take_memory() -> None:
    import psutil

    daemon = psutil.Process()
    MEMORY.clear()
    MEMORY.set(daemon.memory_info().rss, process="daemon")
    for child in daemon.children():
        with suppress(psutil.NoSuchProcess):
            name = _process_name(child.cmdline())
            if name == KEEPER:
                MEMORY.merge(("language-server",), sum(one.memory_info().rss for one in child.children(recursive=True)))
            MEMORY.merge((name,), child.memory_info().rss)


def _process_name(command: Sequence[str]) -> str:
    """`worker-` and its name, else the module of ours that the process runs; several may share a name."""
    with suppress(ValueError, TypeError, KeyError, IndexError):
        argument = json.loads(command[-1])
        if "blackbox_fd" in argument:
            return f"worker-{argument['name']}"
    module = next((word for word in command if word.startswith("millhand.")), "millhand.other")
    return module.rpartition(".")[2]
