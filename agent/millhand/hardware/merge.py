"""Joins what several sources say of one node. The sources come in order of trust; the first that knows a fact wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Problem

Record = TypeVar("Record", bound=msgspec.Struct)

# Facts that do not change while a node runs: two sources that differ here were recorded on different nodes, or one
# of them is wrong. Everything else (temperature, power, free memory) may differ, because time passed.
STEADY = ("name", "uuid", "memory_bytes", "mig_enabled", "compute_capability")
# Flags that are false until a source says otherwise.
RAISED = ("ready", "unified_memory")


def merge(sources: Sequence[Hardware]) -> Hardware:
    """Join `sources`, most trusted first. A steady fact on which two differ becomes a Problem that says which won."""
    whole = Hardware()
    for source in sources:
        whole = _add(whole, source)
    return whole


def _add(whole: Hardware, source: Hardware) -> Hardware:
    label = source.source
    problems = [*whole.problems, *source.problems]
    for field in ("driver", "cuda"):
        _compare(problems, label, field, getattr(whole, field), getattr(source, field))
    accelerators = _join_lists(
        whole.accelerators, source.accelerators, _same_gpu, lambda a, b: _join_gpus(problems, label, a, b)
    )
    jetson = join(whole.jetson, source.jetson) if whole.jetson and source.jetson else whole.jetson or source.jetson
    if whole.jetson and source.jetson:
        for field in ("model", "module", "l4t"):
            _compare(problems, label, f"jetson.{field}", getattr(whole.jetson, field), getattr(source.jetson, field))
    return Hardware(
        source=whole.source or source.source,
        cpu=join(whole.cpu, source.cpu),
        memory=join(whole.memory, source.memory),
        storage=join(whole.storage, source.storage),
        disks=_join_lists(whole.disks, source.disks, lambda a, b: a.name == b.name, lambda a, b: join(b, a)),
        accelerators=accelerators,
        topology=join(whole.topology, source.topology),
        jetson=jetson,
        driver=whole.driver or source.driver,
        cuda=whole.cuda or source.cuda,
        virtualisation=whole.virtualisation or source.virtualisation,
        problems=tuple(dict.fromkeys(problems)),
    )


def join(first: Record, second: Record) -> Record:
    """Field by field: what `first` knows, else what `second` knows."""
    fields = {}
    for name in first.__struct_fields__:
        value = getattr(first, name)
        fields[name] = getattr(second, name) if _unknown(value) or (name in RAISED and not value) else value
    return type(first)(**fields)


def _unknown(value: Any) -> bool:
    return value is None or (not value and not isinstance(value, bool | int | float))


def _join_lists(
    first: tuple[Record, ...],
    second: Iterable[Record],
    same: Callable[[Record, Record], bool],
    joined: Callable[[Record, Record], Record],
) -> tuple[Record, ...]:
    """Join each record of `second` with its partner in `first`; one without a partner is added at the end."""
    records = list(first)
    free = set(range(len(records)))
    for record in second:
        place = next((i for i in sorted(free) if same(records[i], record)), None)
        if place is None:
            records.append(record)
        else:
            free.discard(place)
            records[place] = joined(records[place], record)
    return tuple(records)


def _same_gpu(one: Accelerator, other: Accelerator) -> bool:
    """The UUID decides, then the PCI bus, then the index."""
    for field in ("uuid", "pci_bus"):
        values = getattr(one, field), getattr(other, field)
        if all(values):
            return bool(values[0] == values[1])
    return one.index is not None and one.index == other.index


def _same_slice(one: MigInstance, other: MigInstance) -> bool:
    """The GPU and compute instance decide, then the index, then the UUID."""
    if one.gpu_instance is not None and other.gpu_instance is not None:
        compute = (one.compute_instance, other.compute_instance)
        return one.gpu_instance == other.gpu_instance and (None in compute or compute[0] == compute[1])
    if one.index is not None and other.index is not None:
        return one.index == other.index
    return bool(one.uuid) and one.uuid == other.uuid


def _join_gpus(problems: list[Problem], label: str, first: Accelerator, second: Accelerator) -> Accelerator:
    # The PCI bus gives a GPU a name of its own; only two drivers' answers can contradict each other.
    for field in STEADY if second.ready else ():
        _compare(problems, label, f"accelerators[{first.index}].{field}", getattr(first, field), getattr(second, field))
    merged = join(first, second)
    slices = _join_lists(first.mig, second.mig, _same_slice, join)
    if merged.name.endswith("...") and second.name.startswith(merged.name.removesuffix("...")):
        return msgspec.structs.replace(merged, mig=slices, name=second.name)
    return msgspec.structs.replace(merged, mig=slices)


def _compare(problems: list[Problem], label: str, field: str, won: Any, lost: Any) -> None:
    if _unknown(won) or _unknown(lost) or won == lost or _rounded(won, lost):
        return
    problems.append(
        Problem(
            label,
            field,
            f"it says {lost!r}, but a more trusted source says {won!r}, which is used",
            "record every file on the same node, at the same time",
        )
    )


def _rounded(won: Any, lost: Any) -> bool:
    """True for two spellings of one fact: a shortened name, or sizes that differ by rounding only."""
    if isinstance(won, str) and isinstance(lost, str):
        short = [text.removesuffix("...").removeprefix("NVIDIA ") for text in (won, lost)]
        return short[0].startswith(short[1]) or short[1].startswith(short[0])
    if isinstance(won, int) and isinstance(lost, int) and not isinstance(won, bool):
        return abs(won - lost) <= max(won, lost) // 50
    return False
