"""Composes everything: start, reload, stop; nothing else."""

from __future__ import annotations

import os

# onnxruntime's wheels look up their vendor's host at import; this must stand before any import that may load it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import asyncio
import contextlib
import fcntl
import gc
import logging
import signal
import sys
import threading
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millhand.calls import Calls
from millhand.config import Config, load_config
from millhand.config_changes import ConfigChanges, config_changes, with_reloaded
from millhand.control import ControlServer
from millhand.errors import ConfigError, MillhandError
from millhand.fleet import Fleet
from millhand.hardware import Hardware, discover
from millhand.hardware.visible import VARIABLE, visible_devices
from millhand.language.node import NodeLanguage
from millhand.logs import configure_logs
from millhand.node_metrics import NodeMetrics
from millhand.owner import other_owner, start_command
from millhand.pipeline.recorder import Recorder
from millhand.profiles import Match, load_profiles, match, profile_named
from millhand.records import Alert, Batch, Severity
from millhand.registry import Registry
from millhand.serving.candidates import node_candidates
from millhand.serving.front import FrontProcess, grpc_front, http_front
from millhand.serving.model_calls import UNNAMED, ModelCalls
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.selftest import SelfTest, log_trials
from millhand.store import Step, Store
from millhand.store.database import Loss
from millhand.systemd import notify, notify_reloading, watchdog_interval_s

if TYPE_CHECKING:
    from millhand.telemetry.publisher import Publisher

log = logging.getLogger("millhand.daemon")

SELF_CHECK_EVERY_S = 5.0
SELF_CHECK_DEADLINE_S = 10.0
THREADS_CAP = 64
THREADS_DEADLINE_S = 1.0
THREAD_NAME = "millhand-work"
PLUGIN_RETRY_FIRST_S = 5.0
PLUGIN_RETRY_LAST_S = 300.0


class Daemon:
    """The agent of one node. `start` brings everything up in the way of the data, `stop` takes it down against it."""

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        self.config = config
        self.config_path = config_path
        self.started_monotonic = time.monotonic()
        self.ready = False
        self.registry = Registry()
        self.hardware: Hardware
        self.match: Match
        self.store: Store
        self.repository: Repository
        self.pool: ModelPool
        self.language: NodeLanguage
        self.publisher: Publisher | None = None
        self.recorder: Recorder
        self.fleet: Fleet
        self.metrics: NodeMetrics
        self.self_test: SelfTest
        self.healthy_at = time.monotonic()
        self._control: ControlServer
        self._http: FrontProcess | None = None
        self._grpc: FrontProcess | None = None
        self._set_aside_told = 0
        self._started = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._run_dir_lock: int | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bring the node up. Raises MillhandError where it cannot work at all."""
        config = self.config
        self._make_folders()
        self._claim_run_dir()
        self._make_fronts()
        self.registry.load(config.plugin_tables())
        self.language = NodeLanguage(lambda: self.config, self.registry)
        self.hardware = await asyncio.to_thread(discover, config.node.hardware_root)
        self.match = self._match_profile()
        self.store = await Store.open(config.node.store_path, config.store)
        await self._tell_set_aside()
        repository = self.repository = Repository.from_config(config, self._model_folders())
        self.pool = ModelPool(
            repository,
            config.models,
            hosts=self.match.workers,
            registry=self.registry,
            run_dir=config.node.run_dir,
            candidates=node_candidates(config, self.config_path, self.registry, repository, self.hardware, self.match),
        )
        self.self_test = SelfTest(self.registry, config.models, self.match.workers, repository, config.models_needed())
        await self.pool.start(needed=self._models_needed())
        await self.language.start(self.hardware, self.match, self.store, repository, self.pool)
        self.publisher = self._make_publisher()
        self.recorder = Recorder(config.node.data_dir, config.recording)
        self.recorder.start()
        self.fleet = Fleet(config, self.registry, self.store, self.pool, self.recorder, self.publisher)
        await self.fleet.start()
        if self.publisher is not None:  # after the assets, so that none is born before it speaks
            await self.publisher.start()
        self.language.revision.start()
        self.metrics = NodeMetrics(self)
        calls = Calls(self)
        self._control = ControlServer(config.node.control_path, calls.handlers())
        await self._control.start()
        for front in (self._http, self._grpc, self.language.gateway):
            if front is not None:
                await front.start()
        self._spawn(self._watch_self(), "self-check")
        self._spawn(self._retry_plugins(), "plugin retry")
        if self.self_test.worthwhile:
            self._spawn(log_trials(self.self_test), "self-test")
        self.ready = True
        self._started.set()
        notify(f"READY=1\nSTATUS=profile {self.match.profile.name}, {len(config.assets)} assets")
        log.info("ready: profile %s, %d assets", self.match.profile.name, len(config.assets))
        # What lives now lives as long as the daemon: going through it at each full collection stops all for 35 ms.
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        """Take everything down; each stage finishes what it has in hand."""
        notify("STOPPING=1")
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        language = getattr(self, "language", None)
        stages = [
            ("http", self._http),
            ("grpc", self._grpc),
            ("order revision", getattr(language, "revision", None)),
            ("gateway", getattr(language, "gateway", None)),
            ("assets", getattr(self, "fleet", None)),
            ("recorder", getattr(self, "recorder", None)),
            ("publisher", self.publisher),
            ("language servers", getattr(language, "servers", None)),
            ("knowledge", getattr(language, "knowledge", None)),
            ("models", getattr(self, "pool", None)),
            ("control", getattr(self, "_control", None)),
        ]
        for name, stage in stages:
            if stage is not None:
                try:
                    await stage.stop()
                except Exception:
                    log.exception("stopping %s failed", name)
        if hasattr(self, "metrics"):
            self.metrics.close()
        if hasattr(self, "store"):
            await self.store.close()
        if self._run_dir_lock is not None:
            os.close(self._run_dir_lock)
            log.info("stopped")  # of one that was refused the folder, nothing ran

    @property
    def http_url(self) -> str:
        """Where the HTTP processes listen; empty where it is switched off."""
        return "" if self._http is None else f"http://{self.config.http.host}:{self._http.port}"

    @property
    def grpc_address(self) -> str:
        """Where the gRPC processes listen, as clients of gRPC write it; empty where it is switched off."""
        return "" if self._grpc is None else f"{self.config.grpc.host}:{self._grpc.port}"

    async def load_model(self, model: str, version: int | None = None, by: str = UNNAMED) -> dict[str, Any]:
        """As `ModelCalls.load`; assets that use the model or waited for it go on with what its model.toml says now."""
        await self._started.wait()
        entry = await ModelCalls(self.pool).load(model, version, by)
        async with self._reloading:
            await self.fleet.apply(self.config, self.publisher)
        return entry

    async def reload(self) -> list[str]:
        """Read the configuration again and apply what changed; return what needs a restart.

        Waits for the start's end. A configuration that is not valid changes nothing and raises ConfigError. Nothing
        buffered is lost: the outbox lies in the store, which stays open.
        """
        await self._started.wait()
        async with self._reloading:
            notify_reloading()
            try:
                return await self._reload()
            finally:
                notify("READY=1")

    async def _reload(self) -> list[str]:
        old, new = self.config, load_config(self.config_path)
        restart = config_changes(old, new, self.registry.loaded()).restart
        self.registry.load(new.plugin_tables())
        self.config = with_reloaded(old, new)
        configure_logs(self.config.log)
        await self.language.reload(old)
        await self.pool.need(self._models_needed(), self._model_folders())
        if self.config.telemetry == old.telemetry:
            await self.fleet.apply(self.config, self.publisher)
        else:
            await self._exchange_publisher()
        for name in restart:
            log.warning("%s changed: this takes effect at the next restart", name)
        log.info("configuration read again: %d assets", len(self.config.assets))
        return restart

    def config_changes(self) -> ConfigChanges:
        """What the configuration says by now that this daemon does not go by. Raises ConfigError."""
        return config_changes(self.config, load_config(self.config_path), self.registry.loaded())

    async def run_until_stopped(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reloads."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()

        def stop(number: signal.Signals) -> None:
            log.info("%s: stopping", number.name)
            stopped.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload_logged(), "reload"))
        starting = asyncio.create_task(self.start(), name="start")
        waiting = asyncio.create_task(stopped.wait(), name="signal")
        try:
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await waiting
        finally:
            for task in (starting, waiting):
                task.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
            await self.stop()

    async def _reload_logged(self) -> None:
        try:
            await self.reload()
        except MillhandError as error:
            log.error("the configuration was not read again: %s", error.message)

    async def _exchange_publisher(self) -> None:
        if self.publisher is not None:
            await self.publisher.stop()
        self.publisher = self._make_publisher()
        await self.fleet.apply(self.config, self.publisher)
        if self.publisher is not None:
            await self.publisher.start()

    def _make_publisher(self) -> Publisher | None:
        if not self.config.telemetry.enabled:
            return None
        from millhand.telemetry.publisher import Publisher  # paho and protobuf cost 6 MB; only for who publishes

        node = self.config.node
        return Publisher(self.config.telemetry, node.group, node.id, self.store)

    def _models_needed(self) -> list[str]:
        """What assets use, and the embedder where knowledge is kept and one is here."""
        config, embedder = self.config, self.config.knowledge.embedder
        knows = any("millhand_knowledge" in plugin.hooks for plugin in self.registry.plugins.values())
        return [*config.models_needed(), *([embedder] if knows and embedder in self.repository.models else [])]

    def _make_folders(self) -> None:
        node = self.config.node
        if user := other_owner(node.data_dir):
            raise ConfigError(
                f"[node] data_dir = '{node.data_dir}' belongs to '{user}', who could not write what root writes there",
                hint=f"{start_command(node.data_dir)}, or with systemd: systemctl start millhand",
            )
        for key, folder in (("data_dir", node.models_dir), ("run_dir", node.run_dir)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"[node] {key} = '{folder}' cannot be made: {error.strerror}",
                    hint=f"create it for this user, or set [node] {key} to a folder that can be written",
                ) from error
            if not os.access(folder, os.W_OK):
                raise ConfigError(
                    f"[node] {key} = '{folder}' cannot be written",
                    hint=f"give it to this user (chown -R {os.geteuid()}:{os.getegid()} '{folder}'), or choose another",
                )

    def _make_fronts(self) -> None:
        """Make what will listen, before anything is loaded. Raises ConfigError where tracing lacks its package."""
        config = self.config
        if config.http.enabled:
            self._http = http_front(config.http, config.node.control_path, config.tracing, config.log)
        if config.grpc.enabled:
            self._grpc = grpc_front(config.grpc, config.node.control_path, config.tracing, config.log)

    def _claim_run_dir(self) -> None:
        """Hold a lock on the run_dir: another daemon would take away our workers' sockets. The kernel frees it."""
        folder = self.config.node.run_dir
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(
                f"[node] run_dir = '{folder}' is in use by another millhand daemon",
                hint="stop it first, or give this one a run_dir and a data_dir of its own",
            ) from error
        self._run_dir_lock = lock

    def _match_profile(self) -> Match:
        folders = [Path(folder) for _, folder in self.registry.collect("millhand_profiles")]
        if self.config.node.profiles_dir is not None:
            folders.append(self.config.node.profiles_dir)
        profiles = load_profiles(folders)
        visible = visible_devices(self.hardware, os.environ.get(VARIABLE))
        if self.config.node.profile != "auto":
            return profile_named(profiles, self.config.node.profile, self.hardware, visible)
        return match(profiles, self.hardware, visible)

    def _model_folders(self) -> list[Path]:
        return [Path(folder) for _, folder in self.registry.collect("millhand_models")]

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _watch_self(self) -> None:
        """Feed the watchdog only after the store answered: a stuck disk or loop must let it bite."""
        every_s = min(SELF_CHECK_EVERY_S, watchdog_interval_s() or SELF_CHECK_EVERY_S)
        while True:
            try:
                async with asyncio.timeout(SELF_CHECK_DEADLINE_S):
                    await self.store.status()
                    await self._tell_set_aside()
                self.healthy_at = time.monotonic()
                notify("WATCHDOG=1")
            except TimeoutError:
                log.error("the store did not answer within %g s", SELF_CHECK_DEADLINE_S)
            except MillhandError as error:
                log.error("self-check: %s", error.message)
            await asyncio.sleep(every_s)

    async def _tell_set_aside(self) -> None:
        """Raise an alert for each store file that had to be given up: its readings need a person."""
        for loss in self.store.losses[self._set_aside_told :]:
            await self.store.commit(Step("agent", Batch(), b"", alerts=(store_alert(loss),)))
            self._set_aside_told += 1

    async def _retry_plugins(self) -> None:
        delay_s = PLUGIN_RETRY_FIRST_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, PLUGIN_RETRY_LAST_S)
            if not any(plugin.state == "failed" for plugin in self.registry.plugins.values()):
                delay_s = PLUGIN_RETRY_FIRST_S
            elif self.registry.retry_failed():
                async with self._reloading:
                    await self.pool.need(self._models_needed(), self._model_folders())
                    await self.fleet.apply(self.config, self.publisher)


def store_alert(loss: Loss) -> Alert:
    """The alert that names a store file which was given up, and why."""
    now_ns = time.time_ns()
    fate = f"it is set aside as {loss.path}" if loss.path else "nothing is left of it"
    return Alert(
        id=str(uuid.uuid4()),
        asset="agent",
        model="",
        rule="store",
        kind="store_set_aside",
        severity=Severity.WARNING,
        message=f"The store's file is not used any more ({loss.reason}): {fate}; a new one was begun.",
        raised_ns=now_ns,
        changed_ns=now_ns,
        evidence={"file": str(loss.path or ""), "reason": loss.reason},
    )


def run(config: Config, config_path: Path | None = None) -> None:
    """Run the agent until it is told to stop."""
    # The store's thread must not wait 5 ms for a busy event loop: that alone would be half of a commit's budget.
    sys.setswitchinterval(0.0005)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(Daemon(config, config_path)))


async def _run(daemon: Daemon) -> None:
    """Serve until stopped, then end the process even where a library blocks a thread for ever."""
    # Threads are made when needed. asyncio's own handful would be used up by a few adapters that block.
    threads = ThreadPoolExecutor(THREADS_CAP, thread_name_prefix=THREAD_NAME)
    asyncio.get_running_loop().set_default_executor(threads)
    await daemon.run_until_stopped()
    threads.shutdown(wait=False, cancel_futures=True)
    end_s = time.monotonic() + THREADS_DEADLINE_S
    while stuck := sum(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        if time.monotonic() > end_s:
            log.error("%d threads of adapters do not end: the process ends without them", stuck)
            logging.shutdown()
            os._exit(0)  # everything is committed and closed; a normal exit would wait for the threads
        await asyncio.sleep(0.02)
