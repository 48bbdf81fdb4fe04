"""NVIDIA GPUs live, through NVML (nvidia-ml-py). Each call is guarded on its own: a refusal costs one fact."""

from __future__ import annotations

import ctypes
import grp
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Problem, Topology
from millhand.hardware.gpus import bus_address, model_facts, slice_name
from millhand.hardware.tree import Tree

LIBRARY = "libnvidia-ml.so.1"
NVIDIA_VENDOR = 0x10DE
DISPLAY_CLASSES = (0x0300, 0x0302)  # PCI: VGA controller, 3D controller
NVSWITCH_CLASS = 0x0680  # PCI: other bridge, which is how NVSwitches show
ARCHITECTURES = {4: "Pascal", 5: "Volta", 6: "Turing", 7: "Ampere", 8: "Ada Lovelace", 9: "Hopper", 10: "Blackwell"}
# nvmlDeviceGetTopologyCommonAncestor -> the words of `nvidia-smi topo -m`.
ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
NVLINKS_CAP = 18
CONTROL_DEVICE = "/dev/nvidiactl"
"""What NVML opens first, for reading and writing."""
DRIVER_HINT = "install the NVIDIA driver, or boot the node so that driver and library are of one version"


def has_library() -> bool:
    """True where the driver's NVML library can be loaded; only then is the Python binding worth its import."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def read_nvml(tree: Tree, *, integrated: bool = False) -> Hardware:
    """Ask NVML for every GPU; where no driver answers, say which GPUs the PCI bus shows.

    `integrated`: the node is a Jetson, whose GPU NVML lists without memory.
    """
    on_bus = _pci_gpus(tree)
    if not has_library():
        return Hardware(source="/sys/bus/pci", accelerators=on_bus)
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        # A Jetson before JetPack 6 has no NVML, and a node without a GPU may still have the library.
        problems = (_no_start(error),) if on_bus else ()
        return Hardware(source="nvml", accelerators=on_bus, problems=problems)
    try:
        return _Reading(pynvml, tree, integrated).hardware()
    finally:
        pynvml.nvmlShutdown()


def _no_start(error: Exception) -> Problem:
    """What keeps NVML from starting: most often a driver that is not loaded, or rights that are missing."""
    device, message = Path(CONTROL_DEVICE), f"NVML does not start: {error}"
    if not device.exists() or os.access(device, os.R_OK | os.W_OK):
        return Problem("nvml", "accelerators", message, DRIVER_HINT)
    mode, group = device.stat().st_mode, device.stat().st_gid
    message += f"; this user may not open {device} ({stat.filemode(mode)}, group {_group_name(group)})"
    if mode & stat.S_IRGRP and mode & stat.S_IWGRP:
        hint = f"add the agent's user to the group '{_group_name(group)}' (usermod -aG), then start the agent again"
    else:
        hint = "set NVreg_DeviceFileGID and NVreg_DeviceFileMode=0660 of the driver's module, then boot the node"
    return Problem("nvml", "accelerators", message, hint)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _pci_gpus(tree: Tree) -> tuple[Accelerator, ...]:
    found: list[Accelerator] = []
    for path in tree.glob("sys/bus/pci/devices/*"):
        device_class = (tree.number(f"{path}/class") or 0) >> 8
        if tree.number(f"{path}/vendor") == NVIDIA_VENDOR and device_class in DISPLAY_CLASSES:
            bus = bus_address(path.rsplit("/", 1)[-1])
            found.append(Accelerator(index=len(found), name="NVIDIA GPU", pci_bus=bus))
    return tuple(found)


class _Reading:
    """One pass over NVML, which collects what it could not read."""

    def __init__(self, nvml: Any, tree: Tree, integrated: bool) -> None:
        self._nvml = nvml
        self._tree = tree
        self._integrated = integrated
        self._problems: list[Problem] = []

    def hardware(self) -> Hardware:
        nvml = self._nvml
        count = self._ask("accelerators", nvml.nvmlDeviceGetCount) or 0
        handles = [self._ask(f"accelerators[{i}]", nvml.nvmlDeviceGetHandleByIndex, i) for i in range(count)]
        gpus = [self._gpu(i, handle) for i, handle in enumerate(handles) if handle is not None]
        cuda = self._ask("cuda", nvml.nvmlSystemGetCudaDriverVersion_v2)
        return Hardware(
            source="nvml",
            driver=_text(self._ask("driver", nvml.nvmlSystemGetDriverVersion)),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            accelerators=tuple(gpus),
            topology=self._topology([handle for handle in handles if handle is not None]),
            problems=tuple(self._problems),
        )

    def _ask(self, field: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call NVML; None where it refuses. What the card does not support is no problem."""
        nvml = self._nvml
        quiet = (nvml.NVMLError_NotSupported, nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument)
        try:
            return function(*arguments)
        except quiet:
            return None
        except (nvml.NVMLError, AttributeError, UnicodeDecodeError) as error:
            self._problems.append(Problem("nvml", field, f"{function.__name__}: {error}", DRIVER_HINT))
            return None

    def _gpu(self, index: int, handle: Any) -> Accelerator:
        nvml, field = self._nvml, f"accelerators[{index}]"
        name = _text(self._ask(f"{field}.name", nvml.nvmlDeviceGetName, handle))
        architecture, by_name = model_facts(name)
        capability = self._ask(f"{field}.compute_capability", nvml.nvmlDeviceGetCudaComputeCapability, handle)
        capability_text = f"{capability[0]}.{capability[1]}" if capability else by_name
        memory = self._ask(f"{field}.memory_bytes", nvml.nvmlDeviceGetMemoryInfo, handle)
        pci = self._ask(f"{field}.pci_bus", nvml.nvmlDeviceGetPciInfo, handle)
        mig = self._ask(f"{field}.mig_enabled", nvml.nvmlDeviceGetMigMode, handle)
        ecc = self._ask(f"{field}.ecc_enabled", nvml.nvmlDeviceGetEccMode, handle)
        persistence = self._ask(f"{field}.persistence", nvml.nvmlDeviceGetPersistenceMode, handle)
        limit = self._ask(f"{field}.power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        power = self._ask(f"{field}.power_w", nvml.nvmlDeviceGetPowerUsage, handle)
        arch = self._ask(f"{field}.architecture", nvml.nvmlDeviceGetArchitecture, handle)
        mig_enabled = None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE
        links = None if mig_enabled else self._nvlinks(handle)
        return Accelerator(
            index=index,
            name=name,
            uuid=_text(self._ask(f"{field}.uuid", nvml.nvmlDeviceGetUUID, handle)),
            architecture=ARCHITECTURES.get(arch, architecture),
            compute_capability=capability_text,
            memory_bytes=memory.total if memory else None,
            unified_memory=self._integrated and memory is None,
            mig_enabled=mig_enabled,
            mig=self._slices(field, handle, capability_text) if mig_enabled else (),
            ecc_enabled=None if ecc is None else bool(ecc[0]),
            persistence=None if persistence is None else bool(persistence),
            power_limit_w=None if limit is None else limit / 1000,
            power_w=None if power is None else power / 1000,
            temperature_c=self._temperature(field, handle),
            pci_bus=bus_address(_text(pci.busId)) if pci else "",
            nvlinks=links,
            ready=True,
        )

    def _temperature(self, field: str, handle: Any) -> float | None:
        nvml = self._nvml
        value = self._ask(f"{field}.temperature_c", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return None if value is None else float(value)

    def _nvlinks(self, handle: Any) -> int | None:
        """Active links; None where the card has none at all."""
        states = [
            self._ask("topology", self._nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(NVLINKS_CAP)
        ]
        known = [state for state in states if state is not None]
        return sum(1 for state in known if state) if known else None

    def _slices(self, field: str, handle: Any, capability: str) -> tuple[MigInstance, ...]:
        nvml = self._nvml
        slices = []
        for place in range(self._ask(f"{field}.mig", nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            part = self._ask(f"{field}.mig", nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            if part is None:
                continue
            where = f"{field}.mig[{place}]"
            memory = self._ask(where, nvml.nvmlDeviceGetMemoryInfo, part)
            attributes = self._ask(where, nvml.nvmlDeviceGetAttributes, part)
            processors = attributes.multiprocessorCount if attributes else None
            size = memory.total if memory else None
            slices.append(
                MigInstance(
                    index=place,
                    uuid=_text(self._ask(where, nvml.nvmlDeviceGetUUID, part)),
                    profile=slice_name(capability, processors, size),
                    memory_bytes=size,
                    multiprocessors=processors,
                    gpu_instance=self._ask(where, nvml.nvmlDeviceGetGpuInstanceId, part),
                    compute_instance=self._ask(where, nvml.nvmlDeviceGetComputeInstanceId, part),
                )
            )
        return tuple(slices)

    def _topology(self, handles: list[Any]) -> Topology:
        if len(handles) < 2:
            return Topology()
        rows = [tuple("X" if one is other else self._link(one, other) for other in handles) for one in handles]
        folders = [self._pci_folder(handle) for handle in handles]
        nodes = [self._tree.number(f"{folder}/numa_node") for folder in folders]
        paths = self._tree.glob("sys/bus/pci/devices/*")
        bridges = [path for path in paths if self._tree.number(f"{path}/vendor") == NVIDIA_VENDOR]
        switches = sum((self._tree.number(f"{path}/class") or 0) >> 8 == NVSWITCH_CLASS for path in bridges)
        return Topology(
            links=tuple(rows),
            cpu_affinity=tuple(self._tree.text(f"{folder}/local_cpulist") or "" for folder in folders),
            # A machine with one node says -1.
            numa=tuple("" if node is None else str(max(node, 0)) for node in nodes),
            nvswitches=switches,
        )

    def _pci_folder(self, handle: Any) -> str:
        """Where /sys shows the card; its domain has four digits there."""
        pci = self._ask("topology", self._nvml.nvmlDeviceGetPciInfo, handle)
        return f"sys/bus/pci/devices/{bus_address(_text(pci.busId))[4:]}" if pci else "sys/bus/pci/devices/none"

    def _link(self, one: Any, other: Any) -> str:
        nvml = self._nvml
        peer = self._ask("topology", nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if peer == nvml.NVML_P2P_STATUS_OK:
            return f"NV{self._nvlinks(one) or ''}"
        ancestor = self._ask("topology", nvml.nvmlDeviceGetTopologyCommonAncestor, one, other)
        return ANCESTORS.get(ancestor, "")


def _text(value: Any) -> str:
    """NVML gives str or, in old bindings, bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""
