"""CUDA_VISIBLE_DEVICES: which GPUs and MIG slices millhand may use, resolved to UUIDs once.

NVIDIA's form (CUDA programming guide, environment variables): a comma-separated list of GPU numbers, of UUIDs or of
their unambiguous beginnings (`GPU-8932f937`), or of MIG slices (`MIG-...`); nothing, or -1, hides every GPU. CUDA
silently ignores what follows an entry that it does not know; here such an entry is an error, since a typing mistake
would otherwise take GPUs away. Numbers are those of nvidia-smi, that is, in PCI bus order.
"""

from __future__ import annotations

from collections.abc import Iterator

from millhand.errors import ConfigError
from millhand.hardware.facts import Accelerator, Hardware, MigInstance

VARIABLE = "CUDA_VISIBLE_DEVICES"
HIDE_ALL = "-1"


def device_names(gpu: Accelerator) -> list[str]:
    """What a worker of this GPU may be given: its UUID (its number where none is known), or those of its MIG slices."""
    if gpu.mig_enabled:
        return [part.uuid for part in gpu.mig if part.uuid]
    return [gpu.uuid or str(gpu.index)]


def find_device(hardware: Hardware, name: str) -> Accelerator | MigInstance | None:
    """The GPU or MIG slice that `device_names` calls so; None for the CPU."""
    for gpu in hardware.accelerators:
        if name in (gpu.uuid, str(gpu.index)):
            return gpu
        for part in gpu.mig:
            if name == part.uuid:
                return part
    return None


def visible_devices(hardware: Hardware, text: str | None) -> tuple[str, ...] | None:
    """The devices that `text`, the variable's value, leaves; None where it is not set, so that all are left.

    A GPU in MIG mode stands for its slices. Raises ConfigError for an entry that names no GPU, or more than one.
    """
    if text is None:
        return None
    gpus = [gpu for gpu in hardware.accelerators if gpu.ready]
    if not gpus:
        return ()  # no driver answers: that is reported as such, and there is nothing to narrow
    entries: list[str] = []
    for entry in (part.strip() for part in text.split(",") if part.strip()):
        if entry == HIDE_ALL:
            break
        entries += _resolve(entry, gpus)
    return tuple(dict.fromkeys(entries))


def _resolve(entry: str, gpus: list[Accelerator]) -> list[str]:
    found = list(_named(entry, gpus))
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{gpu.index} ({gpu.uuid or 'UUID not known'})" for gpu in gpus)
    what = "names more than one GPU" if found else "names no GPU of this node"
    raise ConfigError(f"environment: {VARIABLE} has '{entry}', which {what}", hint=f"this node has {known}")


def _named(entry: str, gpus: list[Accelerator]) -> Iterator[list[str]]:
    """The devices of each GPU or slice that `entry` may mean."""
    for gpu in gpus:
        if entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry)):
            yield device_names(gpu)
        elif entry.startswith("MIG-"):
            yield from ([part.uuid] for part in gpu.mig if part.uuid.startswith(entry))
