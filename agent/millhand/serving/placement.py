"""The workers of a node, and which of them a model lives in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from millhand.errors import MillhandError, WorkerError
from millhand.serving.device_memory import device_memory
from millhand.serving.lanes import LoadRequest
from millhand.serving.process import WorkerProcess, describe_exit
from millhand.serving.repository import ModelFolder
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.supervision import EXIT_WAIT_S, Key, SupervisedWorker

CPU = "cpu"
SHARED = "shared"
AVOID_S = 300.0
"""So long an accelerator gets no model after one could not be loaded there again."""


def cpu_host(host: WorkerDefaults) -> WorkerDefaults:
    """What a worker on the CPU beside an accelerator's is told; the same where there is none."""
    return host if host.accelerator == CPU else host.model_copy(update={"accelerator": CPU, "cpus": ()})


class Placement:
    """Makes workers as models need them. A worker that holds no model is a name without a process."""

    def __init__(
        self,
        hosts: Sequence[WorkerDefaults],
        settings: ModelSettings,
        run_dir: Path,
        *,
        approve: Callable[[LoadRequest], Awaitable[None]],
        on_death: Callable[[Key | None, str], None],
        on_change: Callable[[], None],
        on_load_failed: Callable[[SupervisedWorker, Key, MillhandError], None],
    ) -> None:
        """`hosts`: what the profile gives, one for each accelerator; at least one. Starts nothing."""
        self.hosts = tuple(hosts)
        self.workers: dict[str, SupervisedWorker] = {}
        self._settings = settings
        self._run_dir = run_dir
        self._approve = approve
        self._on_death = on_death
        self._trials = itertools.count(1)
        self._on_change = on_change
        self._on_load_failed = on_load_failed
        self._avoided: dict[str, float] = {}  # accelerator -> until when

    def place(self, folder: ModelFolder, current: Sequence[SupervisedWorker] = ()) -> list[SupervisedWorker]:
        """The workers that a model shall live in; one of `current` stays where model.toml still allows it."""
        manifest = folder.manifest
        hosts = self._hosts(manifest.accelerator)
        own = manifest.isolation == "own" or (manifest.isolation == "auto" and hosts[0].accelerator != CPU)
        names = {self._name(folder.name if own else SHARED, host): host for host in hosts}
        if manifest.spread:
            return [self._worker(name, host) for name, host in names.items()]
        for worker in current:
            if worker.name in names:
                return [worker]
        name = max(names, key=lambda name: self._room(names[name])) if len(names) > 1 else next(iter(names))
        return [self._worker(name, names[name])]

    async def try_out(self, request: LoadRequest, host: WorkerDefaults) -> None:
        """Load a version in a process of its own, which then ends: one that crashes or hangs takes nobody along.

        Raises what the load raises, WorkerError for a crash or a hang.
        """
        path = self._run_dir / f"worker-trial-{next(self._trials)}.sock"
        process = await WorkerProcess.start(f"trial of {request.model}", path, self._settings, host)
        timeout_s = self._settings.load_timeout_s
        try:
            await process.client.call("load", timeout_s, **msgspec.structs.asdict(request))
        except WorkerError as error:
            died = process.client.closed
            what = describe_exit(await process.exit_status(EXIT_WAIT_S)) if died else f"took over {timeout_s:g} s"
            raise WorkerError(
                f"a worker of its own {what} while it loaded it: {process.last_word() or error.message}",
                retriable=False,
            ) from error
        finally:
            await process.kill()

    def avoid(self, host: WorkerDefaults) -> bool:
        """Place nothing on an accelerator for some minutes, as long as there is another; returns whether there is."""
        if host.accelerator != CPU:
            self._avoided[host.accelerator] = time.monotonic() + AVOID_S
        return host not in self._hosts(host.accelerator)

    def defaults(self, folder: ModelFolder) -> WorkerDefaults:
        """What the profile says of workers for this model; the same wherever it is placed, but for the accelerator."""
        return self._hosts(folder.manifest.accelerator)[0]

    def _hosts(self, accelerator: str) -> list[WorkerDefaults]:
        if accelerator == CPU and self.hosts[0].accelerator != CPU:
            return [cpu_host(self.hosts[0])]
        now_s = time.monotonic()
        usable = [host for host in self.hosts if self._avoided.get(host.accelerator, 0.0) <= now_s]
        return usable or list(self.hosts)

    def _name(self, label: str, host: WorkerDefaults) -> str:
        """A model's own worker is named after it; `@` marks one of several, or the CPU beside accelerators."""
        if host not in self.hosts:
            return f"{label}@{CPU}"
        return label if len(self.hosts) == 1 else f"{label}@{self.hosts.index(host)}"

    def _room(self, host: WorkerDefaults) -> tuple[int, int]:
        """Free memory first, then the fewest models, where NVML says nothing of memory."""
        memory = device_memory(host.accelerator) if host.accelerator != CPU else None
        models = sum(len(worker.wanted) for worker in self.workers.values() if worker.host == host)
        return memory.free if memory else 0, -models

    def _worker(self, name: str, host: WorkerDefaults) -> SupervisedWorker:
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = SupervisedWorker(
                name,
                host,
                self._launch,
                self._settings,
                approve=self._approve,
                on_death=self._on_death,
                on_change=self._on_change,
                on_load_failed=self._on_load_failed,
            )
        return worker

    async def _launch(self, name: str, generation: int) -> WorkerProcess:
        number = list(self.workers).index(name)  # short, for the kernel's limit on socket paths
        path = self._run_dir / f"worker-{number}-{generation}.sock"
        return await WorkerProcess.start(name, path, self._settings, self.workers[name].host)
