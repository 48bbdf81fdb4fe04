"""CPU, memory, disks and virtualisation from /proc and /sys."""

from __future__ import annotations

import os
import re

from millhand.hardware.facts import Cpu, Disk, Hardware, Memory, Problem, Storage
from millhand.hardware.tree import Tree

# Kernel flag -> the name that millhand uses. x86: arch/x86/include/asm/cpufeatures.h; arm64: hwcap.h.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX512F",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
    "sve": "SVE",
}
# (implementer, part) of MIDR_EL1 -> the core, for the boards that millhand knows (Arm and NVIDIA manuals).
ARM_CORES = {
    (0x41, 0xD07): "Arm Cortex-A57",
    (0x41, 0xD08): "Arm Cortex-A72",
    (0x41, 0xD0B): "Arm Cortex-A76",
    (0x41, 0xD0C): "Arm Neoverse N1",
    (0x41, 0xD40): "Arm Neoverse V1",
    (0x41, 0xD42): "Arm Cortex-A78AE",
    (0x41, 0xD49): "Arm Neoverse N2",
    (0x41, 0xD4F): "Arm Neoverse V2",
    (0x41, 0xD83): "Arm Neoverse V3AE",
    (0x4E, 0x003): "NVIDIA Denver 2",
    (0x4E, 0x004): "NVIDIA Carmel",
}
# Word in the DMI vendor or product -> the hypervisor.
HYPERVISORS = {
    "qemu": "kvm",
    "kvm": "kvm",
    "google": "kvm",
    "amazon ec2": "kvm",
    "openstack": "kvm",
    "vmware": "vmware",
    "microsoft": "hyperv",
    "xen": "xen",
    "virtualbox": "virtualbox",
}
SECTOR_BYTES = 512  # /sys/block/*/size counts these, whatever the disk's own sector size
# Names that tell the kind; of a virtual disk the kernel does not know what lies behind it.
DISK_KINDS = {"nvme": "nvme", "mmcblk": "mmc", "vd": "virtual", "xvd": "virtual"}
# Block devices that are no disks.
NOT_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd", "mtdblock")


def read_host(tree: Tree) -> Hardware:
    """Read what /proc and /sys of `tree` tell; a recorded tree may lack any of it."""
    problems: list[Problem] = []
    return Hardware(
        cpu=_read_cpu(tree, problems),
        memory=_read_memory(tree, problems),
        storage=_read_storage(tree),
        disks=_read_disks(tree),
        virtualisation=_read_virtualisation(tree),
        problems=tuple(problems),
    )


def _read_cpu(tree: Tree, problems: list[Problem]) -> Cpu:
    text = tree.text("proc/cpuinfo")
    if text is None:
        if tree.live:
            problems.append(Problem("/proc/cpuinfo", "cpu", "it cannot be read", "mount /proc"))
        return Cpu(architecture=os.uname().machine if tree.live else "")
    blocks = [dict(re.findall(r"^([^:\n\t]+?)\s*:[ \t]*(.*)$", block, re.M)) for block in re.split(r"\n\s*\n", text)]
    blocks = [block for block in blocks if "processor" in block]
    if not blocks:
        problems.append(Problem("proc/cpuinfo", "cpu", "it lists no processor", "record /proc/cpuinfo again"))
        return Cpu(architecture=os.uname().machine if tree.live else "")
    first = blocks[0]
    flags = set((first.get("flags") or first.get("Features") or "").split())
    arm = "CPU implementer" in first
    sockets = {block.get("physical id", "0") for block in blocks}
    cores = {(block.get("physical id"), block["core id"]) for block in blocks if "core id" in block}
    return Cpu(
        model=first.get("model name", "").strip() or _arm_core(first),
        architecture=os.uname().machine if tree.live else "aarch64" if arm else "x86_64" if flags else "",
        sockets=None if arm else len(sockets),
        cores=len(cores) or len(blocks),
        logical=_count_cpus(tree.text("sys/devices/system/cpu/present")) or len(blocks),
        online=len(blocks),
        usable=_usable_cpus(tree),
        instructions=tuple(name for flag, name in INSTRUCTIONS.items() if flag in flags),
    )


def _arm_core(block: dict[str, str]) -> str:
    try:
        key = (int(block["CPU implementer"], 16), int(block["CPU part"], 16))
    except (KeyError, ValueError):
        return ""
    return ARM_CORES.get(key, f"Arm core {key[0]:#04x}:{key[1]:#05x}")


def _count_cpus(text: str | None) -> int | None:
    """Count the CPUs of a list as in `0-3,8`; None where it is not one."""
    if text is None or not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        return None
    spans = [part.split("-") for part in text.split(",")]
    return sum(max(0, int(span[-1]) - int(span[0]) + 1) for span in spans)


def _usable_cpus(tree: Tree) -> float | None:
    """Affinity and cgroup v2 quota (`cpu.max` = quota and period in microseconds) together."""
    affinity = float(len(os.sched_getaffinity(0))) if tree.live else None
    parts = (tree.text("sys/fs/cgroup/cpu.max") or "").split()
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts) and int(parts[1]) > 0:
        quota = int(parts[0]) / int(parts[1])
        return min(quota, affinity) if affinity else quota
    return affinity


def _read_memory(tree: Tree, problems: list[Problem]) -> Memory:
    text = tree.text("proc/meminfo")
    limit = tree.number("sys/fs/cgroup/memory.max")
    if text is None:
        if tree.live:
            problems.append(Problem("/proc/meminfo", "memory", "it cannot be read", "mount /proc"))
        return Memory(limit_bytes=limit)
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.M | re.A)}
    if "MemTotal" not in kib:
        problems.append(Problem("proc/meminfo", "memory", "it has no MemTotal", "record /proc/meminfo again"))

    def size(key: str) -> int | None:
        return kib[key] * 1024 if key in kib else None

    return Memory(
        total_bytes=size("MemTotal"),
        available_bytes=size("MemAvailable"),
        swap_bytes=size("SwapTotal"),
        limit_bytes=limit,
    )


def _read_storage(tree: Tree) -> Storage:
    if not tree.live:
        return Storage()
    usage = os.statvfs(tree.root)
    return Storage(total_bytes=usage.f_blocks * usage.f_frsize, free_bytes=usage.f_bavail * usage.f_frsize)


def _read_disks(tree: Tree) -> tuple[Disk, ...]:
    disks = []
    for path in tree.glob("sys/block/*"):
        name = path.rsplit("/", 1)[-1]
        sectors = tree.number(f"{path}/size")
        if name.startswith(NOT_DISKS) or not sectors:
            continue
        rotational = tree.number(f"{path}/queue/rotational")
        kind = next((kind for prefix, kind in DISK_KINDS.items() if name.startswith(prefix)), "")
        disks.append(
            Disk(
                name=name,
                model=tree.text(f"{path}/device/model") or "",
                kind=kind or {0: "ssd", 1: "hdd"}.get(-1 if rotational is None else rotational, ""),
                total_bytes=sectors * SECTOR_BYTES,
            )
        )
    return tuple(disks)


def _read_virtualisation(tree: Tree) -> str:
    if tree.live and tree.exists(".dockerenv"):
        return "docker"
    if tree.live and tree.exists("run/.containerenv"):
        return "podman"
    if tree.text("sys/hypervisor/type") == "xen":
        return "xen"
    dmi = [tree.text(f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    words = " ".join(text for text in dmi if text).lower()
    found = next((name for word, name in HYPERVISORS.items() if word in words), "")
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", tree.text("proc/cpuinfo") or "", re.M)
    if flags:
        return found or "vm"
    # Microsoft also sells bare machines, so a name counts only together with the CPU's flag; Arm has no such flag.
    known = tree.exists("proc/cpuinfo") and bool(words)
    return "none" if known else ""
