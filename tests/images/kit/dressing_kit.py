"""Dresses a root folder as a board from its recordings: what programs would read on it, and the tools that they ask.

What no recording holds is stated here: the CPU of an AGX Orin (Arm's part number, Jetson AGX Orin data sheet), the
power mode, compute capabilities (CUDA C++ Programming Guide) and, for the A100, the UUIDs of its slices.
"""

from __future__ import annotations

import csv
import re
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

KIT = Path(__file__).parent
ORIN_CORE = """processor\t: {number}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1

"""
ARCHITECTURE_AMPERE = 7  # NVML_DEVICE_ARCH_AMPERE


@dataclass(frozen=True)
class Board:
    """What a node is dressed as, and what must be said of it."""

    name: str
    architecture: str
    profile: str
    accelerators: tuple[str, ...]
    slices: tuple[str, ...] = ()
    driver: str = ""
    facts: dict[str, str] = field(default_factory=dict)


ORIN = Board(
    "orin",
    "arm64",
    "jetson-agx-orin-64gb",
    ("Jetson AGX Orin (integrated)",),
    facts={
        "model": "NVIDIA Jetson AGX Orin Developer Kit",
        "module": "Jetson AGX Orin 64GB",
        "l4t": "39.2.0",
        "jetpack": "7.2",
        "soc": "Tegra234",
    },
)
A30 = Board("a30", "amd64", "a30-mig", ("NVIDIA A30",), ("2g.12gb", "1g.6gb", "1g.6gb"), "535.183.01")
A100 = Board("a100", "amd64", "a100-80gb", ("NVIDIA A100-SXM4-80GB",), ("1g.20gb",) * 4, "535.54.03")
BOARDS = (ORIN, A30, A100)


def dress(board: Board, root: Path, captures: Path) -> dict[str, str]:
    """Lay into `root` what makes it the board; return the files that must take the place of the kernel's in /proc."""
    if board is ORIN:
        return _dress_orin(root, captures / "jetson")
    facts = _a30_facts(captures / "nvidia") if board is A30 else _a100_facts(captures / "nvidia")
    _dress_card(root, facts)
    return {}


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _dress_orin(root: Path, captures: Path) -> dict[str, str]:
    with (captures / "device_tree_models.csv").open() as file:
        rows = list(csv.reader(file))
    model, compatible = next(row[:2] for row in rows if "p3701-0005 nvidia" in row[1])
    tree = root / "sys/firmware/devicetree/base"  # where /proc/device-tree leads to
    _write(tree / "model", f"{model}\0")
    _write(tree / "compatible", compatible.replace(" ", "\0") + "\0")
    _write(root / "etc/nv_tegra_release", (captures / "nv_tegra_release_r39.2.0_agx_orin.txt").read_text())
    line = (captures / "tegrastats_agx_orin_64gb_jp7.2_2026-07-17.txt").read_text().splitlines()[-1]
    _write(root / "usr/bin/tegrastats", f"#!/bin/sh\nwhile :; do echo '{line}'; sleep 1; done\n", 0o755)
    _write(root / "usr/sbin/nvpmodel", "#!/bin/sh\necho 'NV Power Mode: MAXN'; echo 0\n", 0o755)
    zones = re.findall(r"(\w+)@([\d.]+)C", line)
    for number, (zone, heat_c) in enumerate(zones):
        folder = root / f"sys/class/thermal/thermal_zone{number}"
        _write(folder / "type", f"{zone}-thermal\n")
        _write(folder / "temp", f"{round(float(heat_c) * 1000)}\n")
    used, total = (int(size) for size in re.findall(r"RAM (\d+)/(\d+)MB", line)[0])
    cores = len(re.findall(r"%@", line.partition("CPU [")[2].partition("]")[0]))
    for name in ("possible", "present", "online"):
        _write(root / f"sys/devices/system/cpu/{name}", f"0-{cores - 1}\n")
    memory = {"MemTotal": total, "MemFree": total - used, "MemAvailable": total - used, "Buffers": 0, "Cached": 0}
    memory |= {"Active": used, "Inactive": 0, "Shmem": 0}
    return {
        "cpuinfo": "".join(ORIN_CORE.format(number=number) for number in range(cores)),
        "meminfo": "".join(f"{name}: {mib * 1024:>15} kB\n" for name, mib in {**memory, "SwapTotal": 0}.items()),
    }


@dataclass(frozen=True)
class _Slice:
    uuid: str
    total_mib: int
    used_mib: int
    multiprocessors: int = 0
    gpu_instance: int = 0
    compute_instance: int = 0

    def initialiser(self, name: str) -> str:
        numbers = (self.total_mib, self.used_mib, self.multiprocessors, self.gpu_instance, self.compute_instance)
        return f'{{"{name}", "{self.uuid}", {", ".join(map(str, numbers))}}}'


@dataclass(frozen=True)
class _Card:
    name: str
    bus: str
    driver: str
    cuda: str
    watts: float
    limit_w: float
    celsius: int
    ecc: bool
    persistence: bool
    whole: _Slice
    slices: list[_Slice]

    def header(self) -> str:
        major, minor = self.cuda.split(".")
        devices = [self.whole.initialiser(self.name)]
        devices += [part.initialiser(f"{self.name} MIG") for part in self.slices]
        return "\n".join(
            (
                f'#define DRIVER "{self.driver}"',
                f"#define CUDA {int(major) * 1000 + int(minor) * 10}",
                f'#define BUS "{self.bus}"',
                "#define CAPABILITY_MAJOR 8\n#define CAPABILITY_MINOR 0",
                f"#define ARCHITECTURE {ARCHITECTURE_AMPERE}",
                f"#define MIG {int(bool(self.slices))}",
                f"#define ECC {int(self.ecc)}",
                f"#define PERSISTENCE {int(self.persistence)}",
                f"#define LIMIT_MW {round(self.limit_w * 1000)}",
                f"#define POWER_MW {round(self.watts * 1000)}",
                f"#define CELSIUS {self.celsius}",
                f"static const struct device devices[] = {{{', '.join(devices)}}};\n",
            )
        )


def _dress_card(root: Path, card: _Card) -> None:
    """The driver's library, compiled here for the machine that it stands in for, and the card on the PCI bus."""
    header = root / "tmp/facts.h"
    _write(header, card.header())
    library = root / "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
    library.parent.mkdir(parents=True, exist_ok=True)
    source = KIT / "nvml_standin.c"
    flags = ["-shared", "-fPIC", "-O1", f"-I{header.parent}", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)
    header.unlink()
    device = root / f"sys/bus/pci/devices/{card.bus[4:].lower()}"
    _write(device / "vendor", "0x10de\n")
    _write(device / "class", "0x030200\n")


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match is not None, f"the recording has no {pattern}"
    return match.groups()


def _a30_facts(captures: Path) -> _Card:
    table = (captures / "nvidia-smi_a30_mig_535.183.01.txt").read_text()
    names = (captures / "a30_mig_L_three_instances.txt").read_text()
    driver, cuda = _found(r"Driver Version: (\S+)\s+CUDA Version: (\S+)", table)
    celsius, watts, limit, used, total = _found(
        r"(\d+)C\s+P\d\s+(\d+)W / (\d+)W \|\s+(\d+)MiB / (\d+)MiB \|\s+N/A", table
    )
    rows = re.findall(r"\|\s+0\s+(\d+)\s+(\d+)\s+\d+\s+\|\s+(\d+)MiB /\s+(\d+)MiB\s+\| (\d+)", table)
    return _Card(
        name="NVIDIA A30",
        bus=_found(r"(\w{8}:\w\w:\w\w\.\w)", table)[0],
        driver=driver,
        cuda=cuda,
        watts=float(watts),
        limit_w=float(limit),
        celsius=int(celsius),
        ecc=True,  # the table counts its errors
        persistence=False,
        whole=_Slice(_found(r"GPU 0: .*\(UUID: (GPU-\S+)\)", names)[0], int(total), int(used)),
        slices=[
            _Slice(name, int(size), int(taken), int(processors), int(instance), int(compute))
            for name, (instance, compute, taken, size, processors) in zip(
                re.findall(r"\(UUID: (MIG-\S+)\)", names), rows, strict=True
            )
        ],
    )


def _a100_facts(captures: Path) -> _Card:
    document = ElementTree.parse(captures / "nvidia-smi-qx_a100-sxm4-v12.xml").getroot()  # a file of ours
    gpu = document.find("gpu")
    assert gpu is not None

    def text(path: str, below: ElementTree.Element = gpu) -> str:
        found = below.findtext(path)
        assert found, f"the recording has no {path}"
        return found

    def quantity(path: str, below: ElementTree.Element = gpu) -> float:
        return float(text(path, below).split()[0])

    def part(below: ElementTree.Element) -> _Slice:
        instance = int(text("gpu_instance_id", below))
        return _Slice(
            f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'slice {instance}')}",
            int(quantity("fb_memory_usage/total", below)),
            int(quantity("fb_memory_usage/used", below)),
            int(text("device_attributes/shared/multiprocessor_count", below)),
            instance,
            int(text("compute_instance_id", below)),
        )

    return _Card(
        name=text("product_name"),
        bus=gpu.get("id", ""),
        driver=text("driver_version", document),
        cuda=text("cuda_version", document),
        watts=quantity("gpu_power_readings/power_draw"),
        limit_w=quantity("gpu_power_readings/current_power_limit"),
        celsius=int(quantity("temperature/gpu_temp")),
        ecc=text("ecc_mode/current_ecc") == "Enabled",
        persistence=text("persistence_mode") == "Enabled",
        whole=_Slice(text("uuid"), int(quantity("fb_memory_usage/total")), int(quantity("fb_memory_usage/used"))),
        slices=[part(below) for below in gpu.iterfind("mig_devices/mig_device")],
    )
