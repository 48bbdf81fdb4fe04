"""`millhand hw`: what this node is, or what a node was whose recordings are at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millhand.cli.output import Output, json_option, table, wrapped

if TYPE_CHECKING:
    from millhand.hardware import Accelerator, Hardware, Jetson, Problem

GIB = 1 << 30
LABEL_CHARACTERS = 12


@click.group("hw")
def command() -> None:
    """Show this node's hardware."""


@command.command("show")
@click.option(
    "--root", type=click.Path(path_type=Path), help="Read this folder or file of recordings instead of the live node."
)
@json_option
@click.pass_context
def show(ctx: click.Context, root: Path | None) -> None:
    """Show CPU, memory, disks, GPUs and what is wrong with them.

    Recordings are `nvidia-smi -q -x`, `topo -m`, tegrastats, /proc, /sys and others: see docs/hardware.md.
    """
    from millhand.hardware import discover
    from millhand.hardware.visible import VARIABLE, visible_devices

    output: Output = ctx.obj
    hardware = discover(root or output.config().node.hardware_root)
    visible = visible_devices(hardware, os.environ.get(VARIABLE))
    lines = hardware_lines(hardware, visible)
    if root is None and output.config().language.model:
        from millhand.cli.language import served_by
        from millhand.profiles import match_node

        lines += ["", *served_by(output, match_node(output.config())[1], hardware)]
    output.emit({**hardware.to_dict(), "visible_devices": visible}, lines)


def hardware_lines(hardware: Hardware, visible: Sequence[str] | None = None) -> list[str]:
    """Lay a node out within 80 columns, problems with their remedies at the end.

    visible: the devices that CUDA_VISIBLE_DEVICES leaves; None where it is not set.
    """
    lines: list[str] = []
    for label, text in _facts(hardware):
        lines += _wrap(label, text)
    if visible is not None:
        lines += _wrap("Visible", ", ".join(visible) or "no GPU, by CUDA_VISIBLE_DEVICES")
    if hardware.accelerators:
        lines += ["", *_gpu_table(hardware.accelerators)]
        for gpu in hardware.accelerators:
            lines += _slices(gpu)
    if len(hardware.topology.links) > 1:
        names = [f"gpu{index}" for index in range(len(hardware.topology.links))]
        rows = [(name, *row) for name, row in zip(names, hardware.topology.links, strict=True)]
        lines += ["", *table(["link", *names], rows)]
    lines += [line for problem in _grouped(hardware.problems) for line in problem]
    return lines


def _facts(hardware: Hardware) -> Iterator[tuple[str, str]]:
    cpu, memory = hardware.cpu, hardware.memory
    yield "Source", hardware.source
    counts = [f"{cpu.cores} cores" if cpu.cores else "", f"{cpu.logical} logical" if cpu.logical else ""]
    if cpu.online and cpu.logical and cpu.online < cpu.logical:
        counts.append(f"{cpu.online} switched on")
    if cpu.usable and cpu.logical and cpu.usable < cpu.logical:
        counts.append(f"{cpu.usable:g} usable here")
    sockets = f"{cpu.sockets} sockets" if (cpu.sockets or 0) > 1 else ""
    yield "CPU", _join(cpu.model, cpu.architecture, sockets, *counts)
    yield "", " ".join(cpu.instructions)
    yield (
        "Memory",
        _join(
            _size(memory.total_bytes, "total"),
            _size(memory.available_bytes, "available"),
            _size(memory.swap_bytes, "swap"),
            _size(memory.limit_bytes, "limit of the container"),
        ),
    )
    for index, disk in enumerate(hardware.disks):
        health = {None: "", True: "healthy", False: "FAILING"}[disk.healthy]
        wear = f"{disk.wear_percent:g} % worn" if disk.wear_percent is not None else ""
        heat = f"{disk.temperature_c:g} C" if disk.temperature_c is not None else ""
        facts = _join(disk.name, disk.model, disk.kind, _size(disk.total_bytes), health, wear, heat)
        yield "" if index else "Disks", facts
    yield "Root", _join(_size(hardware.storage.total_bytes, "total"), _size(hardware.storage.free_bytes, "free"))
    if hardware.jetson is not None:
        yield from _jetson_facts(hardware.jetson)
    yield "Driver", _join(hardware.driver, f"CUDA {hardware.cuda}" if hardware.cuda else "")
    yield "Runs in", {"": "", "none": "no virtual machine"}.get(hardware.virtualisation, hardware.virtualisation)


def _jetson_facts(board: Jetson) -> Iterator[tuple[str, str]]:
    yield "Jetson", _join(board.module or board.model or "of unknown module", board.part_number, board.soc)
    if board.module:
        yield "", board.model
    mode = board.power_mode or (f"mode {board.power_mode_id}" if board.power_mode_id is not None else "")
    yield "JetPack", _join(board.jetpack, f"L4T {board.l4t}" if board.l4t else "", f"power mode {mode}" if mode else "")
    yield "Zones", ", ".join(f"{zone} {value:g} C" for zone, value in board.temperatures_c.items())
    yield "Rails", ", ".join(f"{rail.name} {rail.power_w:g} W" for rail in board.rails)
    yield "Engines", ", ".join(f"{engine.name} {'on' if engine.on else 'off'}" for engine in board.engines)
    load = f"GPU {board.gpu_load_percent:g} %" if board.gpu_load_percent is not None else ""
    fan = f"fan {board.fan_percent:g} %" if board.fan_percent is not None else ""
    yield "Load", _join(load, fan)


def _gpu_table(gpus: tuple[Accelerator, ...]) -> list[str]:
    rows = []
    for gpu in gpus:
        memory = "shared" if gpu.unified_memory else _size(gpu.memory_bytes)
        mig = {None: "", True: f"{len(gpu.mig)} slices", False: "off"}[gpu.mig_enabled]
        power = f"{gpu.power_limit_w:.0f} W" if gpu.power_limit_w else ""
        heat = f"{gpu.temperature_c:.0f} C" if gpu.temperature_c is not None else ""
        state = "ready" if gpu.ready else "no driver"
        name = gpu.name or "not known"
        rows.append((gpu.index, name[:30], memory, gpu.compute_capability, mig, power, heat, state))
    return table(["gpu", "name", "memory", "cc", "mig", "limit", "temp", "state"], rows)


def _slices(gpu: Accelerator) -> list[str]:
    if not gpu.mig:
        return []
    rows = [(f"{gpu.index}/{part.index}", part.profile, _size(part.memory_bytes), part.uuid) for part in gpu.mig]
    return ["", *table(["slice", "profile", "memory", "uuid"], rows)]


def _grouped(problems: tuple[Problem, ...]) -> Iterator[list[str]]:
    """Each kind of problem once, with the fields that it concerns."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        groups.setdefault((problem.source, problem.message, problem.hint), []).append(problem.field)
    if groups:
        yield ["", "Problems"]
    for (source, message, hint), fields in groups.items():
        more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
        where = ", ".join(dict.fromkeys(field for field in fields[:3] if field)) + more
        head = f"{source}: {where}: {message}" if where else f"{source}: {message}"
        lines = wrapped(head, "  ", "    ")
        if hint:
            lines += wrapped(f"Try: {hint}", "    ", " " * 9)
        yield lines


def _wrap(label: str, text: str) -> list[str]:
    if not text:
        return []
    return wrapped(text, f"{label:<{LABEL_CHARACTERS}}", " " * LABEL_CHARACTERS)


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _size(size_bytes: int | None, what: str = "") -> str:
    if size_bytes is None or (what == "swap" and not size_bytes):
        return ""
    return f"{size_bytes / GIB:.1f} GiB {what}".rstrip()
