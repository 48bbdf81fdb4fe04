"""The tables that nvidia-smi and lspci print for people."""

from __future__ import annotations

import re

import msgspec

from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Problem, Topology
from millhand.hardware.gpus import bus_address, flag, known, model_facts, size_bytes, slice_name

NO_SLICES = "it is in MIG mode and has no slice, so nothing can run on it"
MAKE_SLICES = "sudo nvidia-smi mig -cgi <profile> -C, or leave MIG mode: sudo nvidia-smi -mig 0"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
NVSWITCH = r"\[10de:(1af1|22a3|29bc)\]"  # PCI ids of NVSwitch 2 (A100), 3 (H100) and 4 (B200)


def read_table(text: str, source: str) -> Hardware:
    """Read what bare `nvidia-smi` prints."""
    head = re.search(r"Driver Version: (\S+)\s+CUDA Version: (\S+)", text)
    body, _, slices = text.partition("Processes:")[0].partition("MIG devices:")
    gpus: dict[int, Accelerator] = {}
    current = None
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        start = re.fullmatch(r"(\d{1,3})\s+(.+?)\s+(On|Off|N/A)", cells[0]) if len(cells) == 3 else None
        if start:
            current = int(start[1])
            gpus[current] = _table_gpu(current, start[2], start[3], cells)
        elif len(cells) == 3 and current in gpus:
            gpus[current] = _table_row(gpus[current], line, cells)
        elif line.startswith("+"):
            current = None
    for line in slices.splitlines():
        row = re.match(r"\|\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+\|\s*\d+MiB /\s*(\d+MiB)\s*\|\s*(\d+)", line, re.A)
        if row and int(row[1]) in gpus:
            gpus[int(row[1])] = _add_slice(gpus[int(row[1])], row)
    problems = [] if gpus else [Problem(source, "accelerators", "it holds no GPU", "nvidia-smi > nvidia-smi.txt")]
    return Hardware(
        source=source,
        driver=known(head[1]) if head else "",
        cuda=known(head[2]) if head else "",
        accelerators=tuple(gpus.values()),
        problems=tuple(problems),
    )


def _table_gpu(index: int, name: str, persistence: str, cells: list[str]) -> Accelerator:
    architecture, capability = model_facts(name)
    ecc = cells[2]
    return Accelerator(
        index=index,
        name=name,
        architecture=architecture,
        compute_capability=capability,
        unified_memory="nvgpu" in name,
        ecc_enabled=True if ecc.isdigit() else flag(ecc),
        persistence=flag(persistence),
        pci_bus=bus_address(cells[1].split()[0] if cells[1] else ""),
        ready=True,
    )


def _table_row(gpu: Accelerator, line: str, cells: list[str]) -> Accelerator:
    """Add what the second and third line of a GPU say."""
    changes: dict[str, object] = {}
    power = re.search(r"(\d+)W\s*/\s*(\d+)W", line, re.A)
    heat = re.search(r"\s(\d+)C\s", line, re.A)
    memory = re.search(r"/\s*(\d+MiB)", cells[1], re.A)
    if power:
        changes |= {"power_w": float(power[1]), "power_limit_w": float(power[2])}
    if heat:
        changes["temperature_c"] = float(heat[1])
    if memory:
        changes["memory_bytes"] = size_bytes(memory[1])
    if not cells[0] and cells[2] in ("Enabled", "Disabled"):
        changes["mig_enabled"] = cells[2] == "Enabled"
    return msgspec.structs.replace(gpu, **changes)


def _add_slice(gpu: Accelerator, row: re.Match[str]) -> Accelerator:
    memory, processors = size_bytes(row[5]), int(row[6])
    added = MigInstance(
        index=int(row[4]),
        profile=slice_name(gpu.compute_capability, processors, memory),
        memory_bytes=memory,
        multiprocessors=processors,
        gpu_instance=int(row[2]),
        compute_instance=int(row[3]),
    )
    return msgspec.structs.replace(gpu, mig=(*gpu.mig, added))


def read_list(text: str, source: str) -> Hardware:
    """Read `nvidia-smi -L`: names, UUIDs and MIG slices."""
    gpus: list[Accelerator] = []
    problems = []
    for line in text.splitlines():
        gpu = re.match(r"GPU (\d+): (.+?) \(UUID: (GPU-[0-9a-f-]+)\)", line)
        part = re.match(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-\S+?)\)", line)
        if gpu:
            gpus.append(_named(int(gpu[1]), gpu[2], gpu[3]))
        elif part and gpus:
            added = MigInstance(index=int(part[2]), profile=part[1], uuid=part[3])
            gpus[-1] = msgspec.structs.replace(gpus[-1], mig_enabled=True, mig=(*gpus[-1].mig, added))
        elif line.strip() and not part:
            problems.append(
                Problem(source, "accelerators", f"line not understood: {line.strip()[:60]!r}", "nvidia-smi -L")
            )
    return Hardware(source=source, accelerators=tuple(gpus), problems=tuple(problems))


def _named(index: int, name: str, uuid: str) -> Accelerator:
    architecture, capability = model_facts(name)
    return Accelerator(
        index=index, name=name, uuid=uuid, architecture=architecture, compute_capability=capability, ready=True
    )


def read_nvlink(text: str, source: str) -> Hardware:
    """Read `nvidia-smi nvlink --status`: active links and their speed."""
    gpus: list[Accelerator] = []
    for line in text.splitlines():
        gpu = re.match(r"GPU (\d+): (.+?) \(UUID: (GPU-[0-9a-f-]+)\)", line)
        link = re.match(r"\s+Link \d+: ([\d.]{1,9}) GB/s", line, re.A)
        if gpu:
            gpus.append(_named(int(gpu[1]), gpu[2], gpu[3]))
        elif link and gpus:
            count = (gpus[-1].nvlinks or 0) + 1
            gpus[-1] = msgspec.structs.replace(gpus[-1], nvlinks=count, nvlink_gb_s=_speed(link[1]))
    return Hardware(source=source, accelerators=tuple(gpus))


def _speed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_instances(text: str, source: str) -> Hardware:
    """Read `nvidia-smi mig -lgi`; of several tables (a transcript) the last one holds."""
    last = text.rpartition("GPU instances:")[2] if "GPU instances:" in text else ""
    gpus: dict[int, Accelerator] = {}
    rows = re.findall(r"^\|\s+(\d+)\s+MIG (\S+)\s+(\d+)\s+(\d+)\s+\d+:\d+", last, re.M | re.A)
    for gpu, profile, _, instance in rows:
        added = MigInstance(profile=profile, gpu_instance=int(instance))
        before = gpus.get(int(gpu), Accelerator(index=int(gpu), mig_enabled=True, ready=True))
        gpus[int(gpu)] = msgspec.structs.replace(before, mig=(*before.mig, added))
    problems = [] if gpus else [Problem(source, "accelerators[].mig", "no MIG slice is made", MAKE_SLICES)]
    return Hardware(source=source, accelerators=tuple(gpus.values()), problems=tuple(problems))


def read_profiles(text: str, source: str) -> Hardware:
    """Read `nvidia-smi mig -lgip` (or -lgipp): which slices a GPU offers, and how many of each are free."""
    gpus: dict[int, list[str]] = {}
    free = []
    for gpu, profile, left, total in re.findall(r"^\|\s+(\d+)\s+MIG (\S+)\s+\d+\s+(\d+)/(\d+)", text, re.M | re.A):
        gpus.setdefault(int(gpu), []).append(profile)
        free.append((int(left), int(total)))
    for gpu in re.findall(r"^GPU\s+(\d+) Profile ID\s+\d+ Placements?\s*:", text, re.M | re.A):
        gpus.setdefault(int(gpu), [])
    accelerators = [
        Accelerator(index=index, mig_enabled=True, mig_profiles=tuple(names), ready=True)
        for index, names in gpus.items()
    ]
    problems = []
    if free and all(left == total for left, total in free):
        problems.append(Problem(source, "accelerators[].mig", NO_SLICES, MAKE_SLICES))
    return Hardware(source=source, accelerators=tuple(accelerators), problems=tuple(problems))


def read_topology(text: str, source: str) -> Hardware:
    """Read `nvidia-smi topo -m`: GPU to GPU links, near CPUs and NUMA nodes. Network cards are left out."""
    lines = ESCAPES.sub("", text).splitlines()
    head = next((line.split("\t") for line in lines if re.match(r"\s*GPU0\s", line)), [])
    columns = [name.strip() for name in head]
    gpus = [place for place, name in enumerate(columns) if re.fullmatch(r"GPU\d+", name)]
    links, affinity, numa = [], [], []
    for line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        if not re.fullmatch(r"GPU\d+", cells[0]) or len(cells) < len(gpus) + 1:
            continue
        cells += [""] * (len(columns) - len(cells))
        links.append(tuple(cells[place] for place in gpus))
        affinity.append(cells[columns.index("CPU Affinity")] if "CPU Affinity" in columns else "")
        numa.append(cells[columns.index("NUMA Affinity")] if "NUMA Affinity" in columns else "")
    problems = []
    if len(links) != len(gpus) or not links:
        message = f"the table names {len(gpus)} GPUs, but holds {len(links)} of their rows"
        problems.append(Problem(source, "topology", message, "nvidia-smi topo -m > topo-m.txt"))
    return Hardware(
        source=source,
        accelerators=tuple(Accelerator(index=index, ready=True) for index in range(len(gpus))),
        topology=Topology(links=tuple(links), cpu_affinity=tuple(affinity), numa=tuple(numa)),
        problems=tuple(problems),
    )


def read_lspci(text: str, source: str) -> Hardware:
    """Read `lspci -nn`: NVIDIA GPUs and NVSwitches on the PCI bus, whether a driver runs or not."""
    gpus: list[Accelerator] = []
    rows = re.findall(
        r"^(\S+) (?:3D|VGA compatible) controller \[03\d\d\]: NVIDIA Corporation (.*?) \[10de:", text, re.M
    )
    for bus, device in rows:
        marked = re.search(r"\[(.+?)\]", device)
        name = f"NVIDIA {marked[1] if marked else device}"
        architecture, capability = model_facts(name)
        gpus.append(
            Accelerator(
                index=len(gpus),
                name=name,
                architecture=architecture,
                compute_capability=capability,
                pci_bus=bus_address(bus),
            )
        )
    switches = len(re.findall(NVSWITCH, text))
    return Hardware(source=source, accelerators=tuple(gpus), topology=Topology(nvswitches=switches))


def read_fabric_log(text: str, source: str) -> Hardware:
    """Read fabricmanager.log: each kind of NVSwitch error, once."""
    errors = dict.fromkeys(re.findall(r"^\[.*?\] \[(?:ERROR|CRITICAL)\] (?:\[tid \d+\] )?(.+)$", text, re.M))
    hint = "nvidia-smi nvlink -e shows the counters; restart nvidia-fabricmanager, and have the board checked"
    return Hardware(
        source=source,
        problems=tuple(Problem(source, "topology", message.strip(), hint) for message in list(errors)[:20]),
    )


def read_failure(text: str, source: str) -> Hardware:
    """Read what nvidia-smi prints where it cannot work."""
    message = text.strip().splitlines()[0][:160]
    return Hardware(
        source=source,
        problems=(
            Problem(source, "accelerators", message, "install the NVIDIA driver, or boot the node and try again"),
        ),
    )
