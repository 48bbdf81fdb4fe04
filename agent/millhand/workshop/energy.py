"""What an inference costs in energy, where the board reports it: NVML's meter, or a Jetson's power rails."""

from __future__ import annotations

from typing import Any

from millhand.hardware.telemetry import INTEGRATED_UUID, Sampler

GAUGE = "nv_energy_consumption"


class Meter:
    """Reads a board's energy while a job runs alone; everything that the board draws counts, idle power too."""

    def __init__(self, sampler: Sampler, accelerator: str) -> None:
        self._sampler = sampler
        names = [f'{GAUGE}{{gpu_uuid="{name}"}}' for name in (accelerator, INTEGRATED_UUID)]
        gauges = sampler.sample() if accelerator not in ("", "cpu") else {}
        self._name = next((name for name in names if name in gauges), "")
        self._start_j: float | None = None
        self.energy_mj: float | None = None
        """Millijoules an inference; None where it was not measured."""

    @property
    def reads(self) -> bool:
        """Whether the board reports energy for this accelerator; a MIG slice has no meter of its own."""
        return bool(self._name)

    def tick(self) -> None:
        """Read now and then while the job runs: a Jetson's energy is the sum of its power at these moments."""
        if self._start_j is not None:
            self._sampler.sample()

    def take(self, line: dict[str, Any]) -> None:
        """A line of the job: `{"energy": "begin"}`, and at the end `{"energy": <inferences>}`."""
        told = line.get("energy")
        if told is None or not self.reads:
            return
        joules = self._sampler.sample().get(self._name)
        if told == "begin":
            self._start_j = joules
        elif joules is not None and self._start_j is not None and told:
            self.energy_mj = (joules - self._start_j) * 1e3 / float(told)
            self._start_j = None
