"""The targets of this node: what candidates may be made for and run on here."""

from __future__ import annotations

import msgspec

from millhand.hardware import Hardware
from millhand.hardware.facts import Accelerator, MigInstance
from millhand.hardware.visible import device_names
from millhand.profiles import Match
from millhand.workshop.recipe import CPU, Target


def target_name(compute_capability: str) -> str:
    """The name of the shelf: `sm80` for `8.0`, `cpu` for none."""
    return f"sm{compute_capability.replace('.', '')}" if compute_capability else CPU


def node_targets(hardware: Hardware, match: Match) -> dict[str, Target]:
    """Accelerator, as workers name it (`cpu`, or a UUID) -> its target.

    A GPU whose compute capability is not known has none: nothing can be made for it.
    """
    profile = match.profile
    cpu = Target(profile=profile.name, precisions=profile.precisions, memory_bytes=hardware.memory.available_bytes or 0)
    targets = {CPU: cpu}
    accelerators = {worker.accelerator for worker in match.workers}
    for gpu in hardware.accelerators:
        for name in device_names(gpu) if gpu.compute_capability else ():
            if name in accelerators:
                targets[name] = msgspec.structs.replace(
                    cpu,
                    name=target_name(gpu.compute_capability),
                    accelerator=name,
                    compute_capability=gpu.compute_capability,
                    memory_bytes=_memory_bytes(hardware, gpu, name),
                )
    return targets


def _memory_bytes(hardware: Hardware, gpu: Accelerator, name: str) -> int:
    """Of the GPU or its slice; where CPU and GPU share their memory, what is available of it."""
    if gpu.unified_memory:
        return hardware.memory.available_bytes or 0
    parts: list[MigInstance | Accelerator] = [part for part in gpu.mig if part.uuid == name]
    return (parts or [gpu])[0].memory_bytes or 0
