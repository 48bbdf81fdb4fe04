"""What makes a node a Jetson: device tree, /etc/nv_tegra_release, nvpmodel, sysfs, and jetson_release's text."""

from __future__ import annotations

import re

from millhand.hardware.facts import Accelerator, Hardware, Jetson, Problem
from millhand.hardware.gpus import model_facts
from millhand.hardware.tree import Tree

DEVICE_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")
# Part number -> module. p3701-0000 is not here: device trees of AGX Orin of either size carry it.
MODULES = {
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial 64GB",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB",
    "p3834-0008": "Jetson AGX Thor 128GB",
    "p2888-0001": "Jetson AGX Xavier 16GB",
    "p2888-0004": "Jetson AGX Xavier 32GB",
    "p2888-0005": "Jetson AGX Xavier 64GB",
    "p2888-0008": "Jetson AGX Xavier Industrial",
    "p3668-0000": "Jetson Xavier NX 8GB",
    "p3668-0001": "Jetson Xavier NX 8GB",
    "p3668-0003": "Jetson Xavier NX 16GB",
    "p3310-1000": "Jetson TX2",
}
# (words of the device tree's model, modules by the largest MemTotal in MiB); used where no part number is known.
FAMILIES = (
    ("AGX Orin Industrial", ((66_000, "Jetson AGX Orin Industrial 64GB"),)),
    ("AGX Orin", ((33_000, "Jetson AGX Orin 32GB"), (66_000, "Jetson AGX Orin 64GB"))),
    ("Orin NX", ((8_400, "Jetson Orin NX 8GB"), (17_000, "Jetson Orin NX 16GB"))),
    ("Orin Nano", ((4_200, "Jetson Orin Nano 4GB"), (8_400, "Jetson Orin Nano 8GB"))),
    ("AGX Thor", ((132_000, "Jetson AGX Thor 128GB"),)),
    ("AGX Xavier", ((17_000, "Jetson AGX Xavier 16GB"), (33_000, "Jetson AGX Xavier 32GB"))),
    ("Xavier NX", ((8_400, "Jetson Xavier NX 8GB"), (17_000, "Jetson Xavier NX 16GB"))),
)
# Jetson Linux -> JetPack, from NVIDIA's JetPack archive. Where the exact release is not listed, its major holds.
JETPACKS = {
    "32.6.1": "4.6", "32.7.1": "4.6.1", "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5",
    "32.7.6": "4.6.6", "32.1": "4.2", "32.2": "4.2.1", "32.3.1": "4.3", "32.4.3": "4.4", "32.4.4": "4.4.1",
    "32.5": "4.5", "32.5.1": "4.5.1", "34.1": "5.0 DP", "34.1.1": "5.0.1 DP", "35.1": "5.0.2", "35.2.1": "5.1",
    "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4", "35.6.1": "5.1.5", "36.2": "6.0 DP",
    "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5": "6.2.2",
    "36.5.2": "6.2.3", "38.2": "7.0", "38.2.1": "7.0", "38.4": "7.1", "39.2": "7.2", "39.2.1": "7.2.1",
}  # fmt: skip
JETPACK_MAJORS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
SOCS = {"tegra186": "Tegra186", "tegra194": "Tegra194", "tegra234": "Tegra234", "tegra264": "Tegra264"}
SOC_OF_CAPABILITY = {"6.2": "Tegra186", "7.2": "Tegra194", "8.7": "Tegra234", "11.0": "Tegra264"}
TRUNCATED = "it is cut off or damaged"


def read_device_tree(tree: Tree) -> Hardware:
    """Read model and compatible of the device tree; a board that is no Jetson gives nothing."""
    folder = next((path for path in DEVICE_TREES if tree.exists(path)), DEVICE_TREES[0])
    model = tree.text(f"{folder}/model") or ""
    compatible = [text for text in re.split(r"[\0\s]+", tree.text(f"{folder}/compatible") or "") if text]
    tegra = [text for text in compatible if text.startswith("nvidia,")]
    if not tegra and not re.search(r"Jetson|NVIDIA Orin", model):
        return Hardware()
    memory = re.search(r"MemTotal:\s+(\d{1,12}) kB", tree.text("proc/meminfo") or "", re.A)
    return describe(f"{folder}/model", model, " ".join(compatible), int(memory[1]) // 1024 if memory else None)


def describe(source: str, model: str, compatible: str, memory_mib: int | None) -> Hardware:
    """Say which module a device tree's texts mean; `memory_mib` tells modules apart that share a model."""
    part = re.search(r"p(?:2888|3310|3668|3701|3767|3834)-\d{4}", compatible)
    number = part[0] if part else ""
    # Boards may run the device tree of a sibling, so the memory that is there decides where it is known.
    module = MODULES.get(number, "")
    module = _by_memory(module or model, memory_mib) or module
    _, capability = model_facts(module or model)
    soc = next((SOCS[name] for name in SOCS if name in compatible), SOC_OF_CAPABILITY.get(capability, ""))
    problems = []
    if not module:
        message = f"model '{model}' does not say which module it is"
        problems.append(
            Problem(source, "jetson.module", message, "record /proc/device-tree/compatible and /proc/meminfo")
        )
    return Hardware(
        source=source,
        jetson=Jetson(model=model, module=module, part_number=number, soc=soc, compute_capability=capability),
        problems=tuple(problems),
    )


def _by_memory(model: str, memory_mib: int | None) -> str:
    for words, modules in FAMILIES:
        if words in model:
            if len(modules) == 1:
                return modules[0][1]
            return next((module for limit, module in modules if memory_mib and memory_mib <= limit), "")
    return ""


def read_release(text: str, source: str) -> Hardware:
    """Read /etc/nv_tegra_release; vendors of carriers append lines of their own, which are left out."""
    found = re.search(r"# R(\d{2}) \(release\), REVISION: (\d{1,2}(?:\.\d{1,2})*),.*?BOARD: (\w+)", text, re.A)
    if found is None:
        problem = Problem(source, "jetson.l4t", TRUNCATED, "record /etc/nv_tegra_release again")
        return Hardware(source=source, problems=(problem,))
    l4t = f"{found[1]}.{found[2]}"
    return Hardware(source=source, jetson=Jetson(l4t=l4t, jetpack=jetpack_of(l4t)))


def jetpack_of(l4t: str) -> str:
    """The JetPack of a Jetson Linux release: `6.2.1` for 36.4.4, `6` for a 36 that is not listed, "" for others."""
    short = re.sub(r"(\.0)+$", "", l4t)
    return JETPACKS.get(l4t) or JETPACKS.get(short) or JETPACK_MAJORS.get(l4t.partition(".")[0], "")


def read_nvpmodel(text: str, source: str) -> Hardware:
    """Read `nvpmodel -q` (`NV Power Mode: MAXN`, then the number) or /var/lib/nvpmodel/status (`pmode:0003`)."""
    name = re.search(r"NV Power Mode(?:\[\d+\])?: *(\S+)", text)
    mode = re.search(r"^(?:pmode:)?0*(\d{1,4})\s*$", text, re.M | re.A)
    if not name and not mode:
        problem = Problem(source, "jetson.power_mode", TRUNCATED, "sudo nvpmodel -q > nvpmodel.txt")
        return Hardware(source=source, problems=(problem,))
    jetson = Jetson(power_mode=name[1] if name else "", power_mode_id=int(mode[1]) if mode else None)
    return Hardware(source=source, jetson=jetson)


def read_jetson_release(text: str, source: str) -> Hardware:
    """Read what jetson-stats' `jetson_release` prints."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)

    def value(label: str) -> str:
        found = re.search(rf"^\s*- {label}: *(.+)$", text, re.M)
        return found[1].strip() if found else ""

    model, part, l4t = value("Model"), value("P-Number"), value("L4T")
    mode = re.search(r"NV Power Mode\[(\d+)\]: *(\S+)", text, re.A)
    size = re.search(r"\((\d{1,3})GB ram\)", value("Module"), re.A)
    base = describe(source, model, part, int(size[1]) * 1000 if size else None)
    found = base.jetson or Jetson()
    jetson = Jetson(
        model=model,
        module=found.module,
        part_number=part,
        soc=found.soc,
        compute_capability=found.compute_capability,
        l4t=l4t,
        jetpack=jetpack_of(l4t),
        power_mode=mode[2] if mode else "",
        power_mode_id=int(mode[1]) if mode else None,
    )
    cuda = re.match(r"\d+\.\d+", value("CUDA"))
    problems = base.problems if model else (Problem(source, "jetson.model", TRUNCATED, "record it again"),)
    return Hardware(source=source, jetson=jetson, cuda=cuda[0] if cuda else "", problems=problems)


def read_fan(tree: Tree) -> float | None:
    """The fan's duty in percent of full PWM (0..255), else None."""
    for path in (*tree.glob("sys/devices/platform/pwm-fan/hwmon/hwmon*/pwm1"), "sys/devices/pwm-fan/cur_pwm"):
        duty = tree.number(path)
        if duty is not None and 0 <= duty <= 255:
            return round(duty / 2.55, 1)
    return None


def integrated_gpu(jetson: Jetson) -> Accelerator:
    """The Jetson's own GPU, which no list of PCI devices shows and whose driver comes with the board."""
    name = re.sub(r" \d+GB$", "", jetson.module) or jetson.model or "Jetson"
    architecture, capability = model_facts(name)
    return Accelerator(
        index=0,
        name=f"{name} (integrated)",
        architecture=architecture,
        compute_capability=jetson.compute_capability or capability,
        unified_memory=True,
        ready=True,
    )
