"""Finds out what a node is: live, or from a root folder (or a single file) of recordings."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from millhand.errors import HardwareError
from millhand.hardware import jetson
from millhand.hardware.facts import Hardware, Jetson, Problem
from millhand.hardware.host import read_host
from millhand.hardware.merge import merge
from millhand.hardware.smi_tables import MAKE_SLICES, NO_SLICES
from millhand.hardware.tegrastats import read_tegrastats
from millhand.hardware.tree import Tree

COMMAND_DEADLINE_S = 3.0
# Files of a folder of captures that are about it and not part of it.
ABOUT = re.compile(r"(?i)(README|LICEN[CS]E|MANIFEST|SHA256SUMS|NOTICE)")


def discover(root: Path | None = None) -> Hardware:
    """Say what this node is, or what the node was whose recordings lie under `root` (a folder or one file).

    A source that is missing or damaged costs its own facts and adds a Problem. Raises HardwareError only where `root`
    does not exist or holds nothing that describes a node.
    """
    if root is None:
        return _finish(_read_live(), "live")
    if not root.exists():
        raise HardwareError(f"'{root}' does not exist", hint="give a file or a folder of recordings")
    if root.is_dir():
        return _finish(_read_folder(root), str(root))
    from millhand.hardware.captures import read_capture

    parts, reason = read_capture(root, root.name)
    if reason:
        raise HardwareError(f"'{root}' describes no node: {reason}", hint="see docs/hardware.md for the recordings")
    return _finish([facts for _, facts in sorted(parts, key=lambda part: part[0])], str(root))


def _read_live() -> list[Hardware]:
    tree = Tree()
    sources = _read_tree(tree)
    board = merge(sources)
    if board.jetson is not None:
        sources += _run_jetson_tools(tree)
    # NVML and its Python binding are loaded only where a driver is there to be asked.
    from millhand.hardware import nvml

    return [nvml.read_nvml(tree, integrated=board.jetson is not None), *sources]


def _run_jetson_tools(tree: Tree) -> list[Hardware]:
    found = []
    for command, lines_cap, reader in (
        (["nvpmodel", "-q"], 8, jetson.read_nvpmodel),
        (["tegrastats", "--interval", "100"], 1, read_tegrastats),
    ):
        text = _first_lines(command, lines_cap)
        if text:
            found.append(reader(text, command[0]))
        else:
            hint = f"install it (it comes with JetPack), or let this user run `{' '.join(command)}`"
            problem = Problem(command[0], "jetson", "it cannot be run, or says nothing", hint)
            found.append(Hardware(source=command[0], problems=(problem,)))
    return [*found, Hardware(source="/sys", jetson=Jetson(fan_percent=jetson.read_fan(tree)))]


def _first_lines(command: list[str], lines_cap: int) -> str:
    """The first lines that a command prints within the deadline; it is ended then (tegrastats never ends by itself)."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    except OSError:
        return ""
    with process:
        deadline = threading.Timer(COMMAND_DEADLINE_S, _end, [process])
        deadline.start()
        text = "".join(itertools.islice(process.stdout or (), lines_cap))
        deadline.cancel()
        _end(process)
    return text


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a command with its children: a child that lives on would hold the pipe open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _read_tree(tree: Tree) -> list[Hardware]:
    release = tree.text("etc/nv_tegra_release")
    status = tree.text("var/lib/nvpmodel/status")
    sources = [read_host(tree), jetson.read_device_tree(tree)]
    if release is not None:
        sources.append(jetson.read_release(release, "etc/nv_tegra_release"))
    if status is not None:
        sources.append(jetson.read_nvpmodel(status, "var/lib/nvpmodel/status"))
    return sources


def _read_folder(root: Path) -> list[Hardware]:
    from millhand.hardware.captures import read_capture

    tree = Tree(root)
    ranked: list[tuple[int, Hardware]] = [(0, source) for source in _read_tree(tree)]
    left_out = []
    for path in sorted(root.iterdir()):
        if not path.is_file() or ABOUT.match(path.name):
            continue
        parts, reason = read_capture(path, path.name)
        ranked += parts
        if reason:
            left_out.append(Problem(path.name, "", f"left out: {reason}", "remove it, or see docs/hardware.md"))
    sources = [facts for _, facts in sorted(ranked, key=lambda part: part[0])]
    if all(source == Hardware(source=source.source) for source in sources):
        reasons = "; ".join(f"{problem.source}: {problem.message}" for problem in left_out[:3])
        raise HardwareError(
            f"'{root}' holds no recording of a node{': ' if reasons else ''}{reasons}",
            hint="see docs/hardware.md for the layout",
        )
    return [*sources, Hardware(problems=tuple(left_out))]


def _finish(sources: list[Hardware], source: str) -> Hardware:
    """Join the sources, and draw the conclusions that need more than one of them."""
    node = _with_jetson(merge(sources))
    problems = dict.fromkeys([*node.problems, *_conclusions(node, source)])
    return msgspec.structs.replace(node, source=source, problems=tuple(problems))


def _with_jetson(node: Hardware) -> Hardware:
    """Give a Jetson its integrated GPU, and an integrated GPU its Jetson."""
    board, gpus = node.jetson, list(node.accelerators)
    place = next((place for place, gpu in enumerate(gpus) if gpu.unified_memory), None)
    if board is None:
        if place is None:
            return node
        board = Jetson(compute_capability=gpus[place].compute_capability)
    integrated = jetson.integrated_gpu(board)
    if place is None:
        gpus.insert(0, integrated)
    elif board.module:
        gpus[place] = msgspec.structs.replace(gpus[place], name=integrated.name)
    capability = board.compute_capability or integrated.compute_capability
    soc = board.soc or jetson.SOC_OF_CAPABILITY.get(capability, "")
    return msgspec.structs.replace(
        node,
        jetson=msgspec.structs.replace(board, compute_capability=capability, soc=soc),
        accelerators=tuple(gpus),
        cpu=msgspec.structs.replace(node.cpu, architecture=node.cpu.architecture or "aarch64"),
    )


def _conclusions(node: Hardware, source: str) -> Iterator[Problem]:
    """Problems that show only when all sources are joined."""
    if not any(problem.message == NO_SLICES for problem in node.problems):
        for gpu in node.accelerators:
            if gpu.mig_enabled and not gpu.mig:
                yield Problem(source, f"accelerators[{gpu.index}].mig", NO_SLICES, MAKE_SLICES)
    idle = [gpu.name or "a GPU" for gpu in node.accelerators if not gpu.ready]
    if idle:
        names = ", ".join(f"{idle.count(name)} x {name}" for name in dict.fromkeys(idle))
        message = f"{names} on the PCI bus, but no driver answers"
        yield Problem(source, "accelerators", message, "install the NVIDIA driver, then boot the node")
