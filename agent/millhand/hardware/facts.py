"""What a node is made of: one type, whatever it was read from.

Every source (NVML, /proc, a recorded `nvidia-smi -q -x` ...) gives a Hardware that holds only what the source knows;
`millhand.hardware.merge` joins them. Unknown text is "", an unknown number or flag is None, an unknown list is ().
"""

from __future__ import annotations

from typing import Any

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """A source that could not be read, or a fact that stops the node from working well.

    source: the file, command or library; field: the fact that is missing or doubtful, as in `accelerators[0].name`.
    """

    source: str
    field: str
    message: str
    hint: str = ""


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """The processor. `instructions` holds the names of INSTRUCTIONS in millhand.hardware.host."""

    model: str = ""
    architecture: str = ""
    """`x86_64` or `aarch64`."""
    sockets: int | None = None
    cores: int | None = None
    logical: int | None = None
    online: int | None = None
    """Logical CPUs that are switched on; a Jetson power mode switches some off."""
    usable: float | None = None
    """CPUs that this process may use: affinity and the cgroup's quota."""
    instructions: tuple[str, ...] = ()


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Main memory in bytes. On a Jetson the GPU uses the same memory."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None
    limit_bytes: int | None = None
    """The cgroup's limit, where a container has one."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A block device, with its SMART facts where smartctl gave them."""

    name: str
    model: str = ""
    kind: str = ""
    """`nvme`, `ssd`, `hdd`, `mmc` or `virtual`."""
    total_bytes: int | None = None
    healthy: bool | None = None
    temperature_c: float | None = None
    wear_percent: float | None = None
    """Share of the rated endurance that is used."""


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """The root file system."""

    total_bytes: int | None = None
    free_bytes: int | None = None


class MigInstance(msgspec.Struct, frozen=True, kw_only=True):
    """One slice of a GPU (NVIDIA Multi-Instance GPU)."""

    index: int | None = None
    uuid: str = ""
    profile: str = ""
    """As NVIDIA names it: `1g.6gb`."""
    memory_bytes: int | None = None
    multiprocessors: int | None = None
    gpu_instance: int | None = None
    compute_instance: int | None = None


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. `ready` is true where a driver answered for it; a GPU that only the PCI bus shows is not usable."""

    index: int | None = None
    name: str = ""
    uuid: str = ""
    architecture: str = ""
    compute_capability: str = ""
    memory_bytes: int | None = None
    unified_memory: bool = False
    """True on a Jetson: budget against the node's available memory instead."""
    mig_enabled: bool | None = None
    mig: tuple[MigInstance, ...] = ()
    mig_profiles: tuple[str, ...] = ()
    """The slices that this card offers, where they were listed."""
    ecc_enabled: bool | None = None
    persistence: bool | None = None
    power_limit_w: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    pci_bus: str = ""
    """`00000000:0b:00.0`."""
    nvlinks: int | None = None
    """Active NVLinks."""
    nvlink_gb_s: float | None = None
    """Speed of one link in one direction, GB/s."""
    ready: bool = False


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """How the GPUs reach each other: `links[i][j]` is `X`, `NV<n>`, `PIX`, `PXB`, `PHB`, `NODE` or `SYS`."""

    links: tuple[tuple[str, ...], ...] = ()
    cpu_affinity: tuple[str, ...] = ()
    """For each GPU the near CPUs, as in `0-31,64-95`."""
    numa: tuple[str, ...] = ()
    nvswitches: int | None = None


class Rail(msgspec.Struct, frozen=True):
    """A power rail of a Jetson, watts now and on average."""

    name: str
    power_w: float
    average_w: float | None = None


class Engine(msgspec.Struct, frozen=True):
    """A fixed-function engine of a Jetson (NVENC, NVDLA0, VIC ...)."""

    name: str
    on: bool
    load_percent: float | None = None
    frequency_mhz: float | None = None


class Jetson(msgspec.Struct, frozen=True, kw_only=True):
    """What only a Jetson has."""

    model: str = ""
    """As the device tree says: `NVIDIA Jetson AGX Orin Developer Kit`."""
    module: str = ""
    """The module in one spelling: `Jetson AGX Orin 64GB`."""
    part_number: str = ""
    soc: str = ""
    compute_capability: str = ""
    l4t: str = ""
    jetpack: str = ""
    power_mode: str = ""
    power_mode_id: int | None = None
    gpu_load_percent: float | None = None
    fan_percent: float | None = None
    temperatures_c: dict[str, float] = {}
    """Zone in lower case -> degrees Celsius; a zone that is switched off is left out."""
    rails: tuple[Rail, ...] = ()
    engines: tuple[Engine, ...] = ()


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One node, as far as it is known."""

    source: str = ""
    """`live`, or the path of the recordings."""
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    storage: Storage = Storage()
    disks: tuple[Disk, ...] = ()
    accelerators: tuple[Accelerator, ...] = ()
    topology: Topology = Topology()
    jetson: Jetson | None = None
    driver: str = ""
    cuda: str = ""
    """The newest CUDA that the driver (or JetPack) runs."""
    virtualisation: str = ""
    """`none`, `kvm`, `vmware`, `hyperv`, `xen`, `docker` ... or `vm` for a hypervisor that is not known."""
    problems: tuple[Problem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data
