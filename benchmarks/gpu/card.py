"""The GPU through NVML: what it is, how much memory is taken, how busy it is."""

from __future__ import annotations

import statistics
import threading
import time
from types import TracebackType
from typing import Any

SAMPLE_EVERY_S = 0.05
MIB = 1 << 20


class Card:
    """The first GPU, through NVML; without one, everything is None."""

    def __init__(self, present: bool) -> None:
        self._device: Any = None
        self.facts: dict[str, Any] = {}
        if not present:
            return
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SystemExit(
                f"no NVIDIA driver answers here ({error}); --cpu tries the script without a GPU"
            ) from error
        self._nvml = pynvml
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        self.facts = {
            "name": pynvml.nvmlDeviceGetName(self._device),
            "memory_mib": pynvml.nvmlDeviceGetMemoryInfo(self._device).total // MIB,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda_of_driver": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }

    def used_mib(self) -> float | None:
        """Memory that is taken on the card, by anyone."""
        return None if self._device is None else self._nvml.nvmlDeviceGetMemoryInfo(self._device).used / MIB

    def busy_percent(self) -> float | None:
        """Share of the last moments (the driver's own, up to a second) in which a kernel ran."""
        return None if self._device is None else float(self._nvml.nvmlDeviceGetUtilizationRates(self._device).gpu)


class Cards:
    """All GPUs, through NVML."""

    def __init__(self, present: bool) -> None:
        self.uuids: list[str] = []
        self._handles: dict[str, Any] = {}
        if present:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self._handles = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
            self.uuids = list(self._handles)

    def keep(self, count: int) -> None:
        """Leave out all but the first."""
        self.uuids = self.uuids[:count]
        self._handles = {uuid: self._handles[uuid] for uuid in self.uuids}

    def used_mib(self) -> list[float]:
        """Memory that is taken on each, by anyone."""
        return [self._nvml.nvmlDeviceGetMemoryInfo(handle).used / MIB for handle in self._handles.values()]

    def await_free(self, used_mib: float, within_s: float) -> bool:
        """Wait until no card has more taken than that: memory comes back a while after a process has ended."""
        until = time.monotonic() + within_s
        while any(used > used_mib for used in self.used_mib()):
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    def pids(self) -> dict[str, set[int]] | None:
        """UUID -> processes that compute on it; None where NVML lists none at all."""
        found = {
            uuid: {one.pid for one in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
            for uuid, handle in self._handles.items()
        }
        return found if any(found.values()) else None


class Watch:
    """Samples how busy the card is, as long as the `with` block lasts."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._stop = threading.Event()
        self._samples: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def mean_percent(self) -> float | None:
        return statistics.mean(self._samples) if self._samples else None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            busy = self._card.busy_percent()
            if busy is not None:
                self._samples.append(busy)
