"""tegrastats, JetPack 4 to 7: the one line of text that a Jetson prints about itself.

What differs between versions, all met in recordings: the time stamp and SWAP may be missing; zones are upper case
(JetPack 5 and before) or lower case; a rail or zone that is off shows -256C, or is missing; temperatures are `44.3C` or
`cur/max`; power is `a/b` in mW without unit, `amW/bmW` or `cur/avg/max`; on Xavier rails have the names of zones.
"""

from __future__ import annotations

import re

from millhand.hardware.facts import Cpu, Engine, Hardware, Jetson, Memory, Problem, Rail
from millhand.hardware.gpus import model_facts

MIB = 1 << 20
# A zone whose rail is off reads -256 C, some read a little less than -50 C; no board works below -40 C.
COLDEST_C = -45.0
NUMBER = r"-?\d{1,9}(?:\.\d{1,6})?"
ENGINES = r"NVENC\d?|NVDEC\d?|NVJPG\d?|VIC|OFA|NVDLA\d|PVA\d|APE|MSENC|SE"
# (all of these words, highest total memory in MiB of the module, module). The rails name the carrier's supplies, so
# they tell the family; memory tells the module.
SIGNATURES = (
    (("VIN_SYS_5V0", "VDD_GPU_SOC", "VDD_CPU_CV"), 33_000, "Jetson AGX Orin 32GB"),
    (("VIN_SYS_5V0", "VDD_GPU_SOC", "VDD_CPU_CV"), 66_000, "Jetson AGX Orin 64GB"),
    (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "AUX@"), 17_000, "Jetson Xavier NX"),
    (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "soc0@"), 4_200, "Jetson Orin Nano 4GB"),
    (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "soc0@"), 8_400, "Jetson Orin Nano 8GB"),
    (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "soc0@"), 17_000, "Jetson Orin NX 16GB"),
    (("MTS fg", "VDD_SYS_GPU"), 8_400, "Jetson TX2"),
    (("SYS5V", "VDDRQ"), 66_000, "Jetson AGX Xavier"),
)


def read_tegrastats(text: str, source: str) -> Hardware:
    """Read the last whole line of a tegrastats log."""
    lines = [line for line in text.splitlines() if re.search(r"\bRAM \d", line)]
    whole = [line for line in lines if "GR3D_FREQ" in line]
    if not whole:
        problem = Problem(source, "jetson", "it holds no whole tegrastats line", "sudo tegrastats | head -n 2")
        return Hardware(source=source, problems=(problem,))
    line = whole[-1]
    cpus = _cpus(line)
    module = _module(line)
    _, capability = model_facts(module)
    return Hardware(
        source=source,
        cpu=Cpu(
            architecture="aarch64",
            logical=len(cpus) or None,
            online=sum(cpu != "off" for cpu in cpus) or None,
        ),
        memory=_memory(line),
        jetson=Jetson(
            module=module,
            compute_capability=capability,
            gpu_load_percent=_percent(r"\bGR3D_FREQ", line),
            temperatures_c=_temperatures(line),
            rails=_rails(line),
            engines=_engines(line),
        ),
        problems=_problems(line, module, source),
    )


def _cpus(line: str) -> list[str]:
    match = re.search(r"\bCPU \[([^\]]*)\]", line)
    return [part.strip() for part in match[1].split(",")] if match else []


def _memory(line: str) -> Memory:
    ram = re.search(r"\bRAM (\d{1,9})/(\d{1,9})MB", line, re.A)
    swap = re.search(r"\bSWAP \d{1,9}/(\d{1,9})MB", line, re.A)
    return Memory(
        total_bytes=int(ram[2]) * MIB if ram else None,
        available_bytes=max(0, int(ram[2]) - int(ram[1])) * MIB if ram else None,
        swap_bytes=int(swap[1]) * MIB if swap else None,
    )


def _percent(word: str, line: str) -> float | None:
    match = re.search(word + r" (\d{1,3})%", line, re.A)
    return float(match[1]) if match else None


def _temperatures(line: str) -> dict[str, float]:
    found = re.findall(rf"\b([A-Za-z]\w*)@({NUMBER})C", line, re.A)
    return {name.lower(): float(value) for name, value in found if float(value) > COLDEST_C}


def _rails(line: str) -> tuple[Rail, ...]:
    """Rails stand behind the temperatures: `NAME cur/avg` in mW, unit or not, with a maximum since JetPack 7.2."""
    tail = line[line.rfind("@") :]
    found = re.findall(r"\b([A-Z]\w+) (\d{1,7})(?:mW)?/(\d{1,7})(?:mW)?(?:/\d{1,7}mW)?(?=\s|$)", tail, re.A)
    return tuple(Rail(name, int(now) / 1000, int(mean) / 1000) for name, now, mean in found if name != "NC")


def _engines(line: str) -> tuple[Engine, ...]:
    engines = []
    for name, state in re.findall(rf"\b({ENGINES})(?:_FREQ)? (off|\d{{1,3}}%@?\d{{0,5}}|\d{{1,5}}\b(?!/))", line, re.A):
        load = re.match(r"(\d+)%", state)
        clock = re.search(r"(?:^|@)(\d+)$", state)
        engines.append(
            Engine(name, state != "off", float(load[1]) if load else None, float(clock[1]) if clock else None)
        )
    return tuple(engines)


def _module(line: str) -> str:
    memory = _memory(line).total_bytes or 0
    for words, limit_mib, module in SIGNATURES:
        if all(word in line for word in words) and 0 < memory <= limit_mib * MIB:
            return module
    return ""


def _problems(line: str, module: str, source: str) -> tuple[Problem, ...]:
    if not module:
        hint = "record /proc/device-tree too"
        return (Problem(source, "jetson.module", "the line names no board, and its rails are not known", hint),)
    block = re.search(r"lfb (\d+)x(\d+)(k|M)B", line)
    if block and int(block[1]) * int(block[2]) * (1 if block[3] == "M" else 1 / 1024) < 4:
        message = f"memory is in pieces: the largest free block is {block[2]} {block[3]}B"
        return (
            Problem(source, "memory", message, "the GPU needs large blocks: stop what takes memory, or boot the node"),
        )
    return ()
