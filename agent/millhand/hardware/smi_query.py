"""`nvidia-smi -q`, `-q -x` and `--query-gpu … --format=csv`: three spellings of the same facts.

Text and XML become nested dicts with the same kind of keys; a driver's renamings are listed beside each fact. Output
that breaks off is used up to where it breaks off.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

import msgspec

from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Problem
from millhand.hardware.gpus import bus_address, flag, known, model_facts, number, size_bytes, slice_name, whole

Node = dict[str, Any]
BROKEN_OFF = "it breaks off; what came before is used"
RECORD_AGAIN = "record it again: nvidia-smi -q -x > nvidia-smi-q.xml"


def read_xml(text: str, source: str) -> Hardware:
    """Read `nvidia-smi -q -x`, any schema from v10 on."""
    root, fault = _parse_xml(text)
    problems = [Problem(source, "accelerators", f"{BROKEN_OFF} ({fault})", RECORD_AGAIN)] if fault else []
    if root is None:
        return Hardware(source=source, problems=tuple(problems))
    head = {child.tag: child.text or "" for child in root if child.tag != "gpu"}
    gpus = [(element.get("id", ""), _nest(element)) for element in root if element.tag == "gpu"]
    return _hardware(source, head, gpus, problems)


def read_text(text: str, source: str) -> Hardware:
    """Read `nvidia-smi -q`."""
    head: Node = {}
    gpus: list[tuple[str, Node]] = []
    stack: list[tuple[int, Node]] = [(-1, head)]
    for line in text.splitlines():
        bare = line.strip()
        if not bare or bare.startswith("="):
            continue
        indent = len(line) - len(line.lstrip())
        start = re.fullmatch(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f:.]+)", bare)
        if start:
            gpus.append((start[1], {}))
            stack = [(-1, head), (indent, gpus[-1][1])]
            continue
        while len(stack) > 1 and stack[-1][0] >= indent:
            stack.pop()
        name, separator, value = bare.partition(" : ")
        place = stack[-1][1]
        if separator:
            place.setdefault(_key(name), value.strip())
        else:
            inner: Node = {}
            _append(place, _key(bare), inner)
            stack.append((indent, inner))
    problems = []
    if not gpus and not head.get("driver_version"):
        problems.append(Problem(source, "accelerators", "it holds no GPU", RECORD_AGAIN))
    return _hardware(source, head, gpus, problems)


def read_csv(text: str, source: str) -> Hardware:
    """Read `nvidia-smi --query-gpu=… --format=csv` with its header line."""
    rows = list(csv.reader(text.splitlines(), skipinitialspace=True))
    names = [re.sub(r"\s*\[.*\]$", "", name) for name in rows[0]] if rows else []
    accelerators, driver = [], ""
    for row in rows[1:]:
        cells = dict(zip(names, row, strict=False))
        if not {"name", "uuid", "index"} & set(cells):
            continue
        driver = driver or known(cells.get("driver_version"))
        name = known(cells.get("name"))
        architecture, capability = model_facts(name)
        accelerators.append(
            Accelerator(
                index=whole(cells.get("index")),
                name=name,
                uuid=known(cells.get("uuid")),
                architecture=architecture,
                compute_capability=known(cells.get("compute_cap")) or capability,
                memory_bytes=size_bytes(cells.get("memory.total")),
                mig_enabled=flag(cells.get("mig.mode.current")),
                ecc_enabled=flag(cells.get("ecc.mode.current")),
                persistence=flag(cells.get("persistence_mode")),
                power_limit_w=number(cells.get("power.limit")),
                power_w=number(cells.get("power.draw")),
                temperature_c=number(cells.get("temperature.gpu")),
                pci_bus=bus_address(cells.get("pci.bus_id")),
                ready=True,
            )
        )
    problems = () if accelerators else (Problem(source, "accelerators", "it holds no GPU", "add `--format=csv`"),)
    return Hardware(source=source, driver=driver, accelerators=tuple(accelerators), problems=problems)


def _parse_xml(text: str) -> tuple[Element | None, str]:
    """The root as far as it was read, and what broke the reading."""
    parser: Any = XMLPullParser(["start"])
    fault = ""
    try:
        parser.feed(text)
        parser.close()
    except ParseError as error:
        fault = str(error)
    # The fault also stands in the queue, behind the good events; the root is the first of those.
    with contextlib.suppress(ParseError):
        for _, element in parser.read_events():
            return element, fault
    return None, fault


def _nest(element: Element) -> Node:
    node: Node = {}
    for child in element:
        _append(node, child.tag, _nest(child) if len(child) else (child.text or "").strip())
    return node


def _append(node: Node, key: str, value: Any) -> None:
    """Put a value under a key; a key that comes again (a MIG device) becomes a list."""
    if key not in node:
        node[key] = value
    elif isinstance(node[key], list):
        node[key].append(value)
    else:
        node[key] = [node[key], value]


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def _first(node: Node, *paths: str) -> str:
    """The first of the dotted paths that holds something."""
    for path in paths:
        current: Any = node
        for part in path.split("."):
            current = current.get(part) if isinstance(current, dict) else None
        if isinstance(current, str) and known(current):
            return known(current)
    return ""


def _list(node: Node, *path: str) -> Iterator[Node]:
    current: Any = node
    for part in path:
        current = current.get(part) if isinstance(current, dict) else None
    yield from (item for item in (current if isinstance(current, list) else [current]) if isinstance(item, dict))


def _hardware(source: str, head: Node, gpus: list[tuple[str, Node]], problems: list[Problem]) -> Hardware:
    attached = whole(head.get("attached_gpus"))
    if attached is not None and attached != len(gpus):
        message = f"it says {attached} GPUs are attached, but holds {len(gpus)}"
        problems.append(Problem(source, "accelerators", message, RECORD_AGAIN))
    accelerators = []
    for index, (bus, node) in enumerate(gpus):
        accelerator = _accelerator(index, bus, node)
        accelerators.append(accelerator)
        for field in ("name", "uuid", "memory_bytes"):
            if not getattr(accelerator, field):
                message = "it does not say it (the output breaks off, or the driver could not tell)"
                problems.append(Problem(source, f"accelerators[{index}].{field}", message, RECORD_AGAIN))
        problems += _health(source, index, node)
    virtual = {_first(node, "gpu_virtualization_mode.virtualization_mode").lower() for _, node in gpus}
    return Hardware(
        source=source,
        driver=known(head.get("driver_version")),
        cuda=known(head.get("cuda_version")),
        accelerators=tuple(accelerators),
        virtualisation="vm" if virtual & {"pass-through", "vgpu", "host vgpu"} else "",
        problems=tuple(problems),
    )


def _accelerator(index: int, bus: str, node: Node) -> Accelerator:
    name = _first(node, "product_name")
    architecture, capability = model_facts(name)
    accelerator = Accelerator(
        index=index,
        name=name,
        uuid=_first(node, "uuid", "gpu_uuid"),
        architecture=_first(node, "product_architecture") or architecture,
        compute_capability=capability,
        memory_bytes=size_bytes(_first(node, "fb_memory_usage.total")),
        mig_enabled=flag(_first(node, "mig_mode.current_mig", "mig_mode.current")),
        ecc_enabled=flag(_first(node, "ecc_mode.current_ecc", "ecc_mode.current")),
        persistence=flag(_first(node, "persistence_mode")),
        power_limit_w=number(
            _first(
                node,
                "gpu_power_readings.current_power_limit",
                "power_readings.enforced_power_limit",
                "power_readings.power_limit",
            )
        ),
        power_w=number(
            _first(
                node,
                "gpu_power_readings.power_draw",
                "gpu_power_readings.instant_power_draw",
                "gpu_power_readings.instantaneous_power_draw",
                "power_readings.power_draw",
            )
        ),
        temperature_c=number(_first(node, "temperature.gpu_temp", "temperature.gpu_current_temp")),
        pci_bus=bus_address(bus or _first(node, "pci.pci_bus_id", "pci.bus_id")),
        ready=True,
    )
    slices = [*_list(node, "mig_devices", "mig_device"), *_list(node, "mig_device")]
    return msgspec.structs.replace(accelerator, mig=tuple(_slice(capability, item) for item in slices))


def _slice(capability: str, node: Node) -> MigInstance:
    memory = size_bytes(_first(node, "fb_memory_usage.total", "shared_fb_memory_usage.total"))
    processors = whole(
        _first(
            node, "device_attributes.shared.multiprocessor_count", "device_attributes.shared.multiprocessor_count_total"
        )
    )
    return MigInstance(
        index=whole(_first(node, "index")),
        profile=slice_name(capability, processors, memory),
        memory_bytes=memory,
        multiprocessors=processors,
        gpu_instance=whole(_first(node, "gpu_instance_id")),
        compute_instance=whole(_first(node, "compute_instance_id")),
    )


def _health(source: str, index: int, node: Node) -> Iterator[Problem]:
    """Faults that the GPU itself reports and that need a person."""
    field = f"accelerators[{index}]"
    if _first(node, "remapped_rows.remapped_row_pending", "remapped_rows.pending") == "Yes":
        yield Problem(source, field, "memory rows wait to be remapped", "reset the GPU, or boot the node, soon")
    if _first(node, "remapped_rows.remapped_row_failure", "remapped_rows.remapping_failure_occurred") == "Yes":
        yield Problem(source, field, "memory rows could not be remapped", "have the card replaced")
    reasons = ("clocks_event_reasons", "clocks_throttle_reasons")
    slow = {
        "hw_power_brake_slowdown": ("the power brake slows the GPU down", "check the power supply and its cables"),
        "hw_thermal_slowdown": ("heat slows the GPU down", "check fans, filters and the ambient temperature"),
    }
    for name, (message, hint) in slow.items():
        paths = [f"{reason}.{prefix}{name}" for reason in reasons for prefix in ("", f"{reason[:-1]}_")]
        if _first(node, *paths) == "Active":
            yield Problem(source, field, message, hint)
