"""The `[match]` table of a profile: rules about hardware, and their verdict on a node in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydantic import Field, field_validator

from millhand.hardware.facts import Accelerator, Hardware
from millhand.hardware.gpus import GIB
from millhand.validation import StrictTable


class MatchRules(StrictTable):
    """Every rule that is stated must hold; of the profiles that match, the highest priority is taken."""

    priority: int = Field(ge=0, le=1000)
    """0 generic CPU, 10 generic NVIDIA, 20 generic Jetson, 30 a model, 40 a model in a special arrangement."""
    accelerator: str = ""
    """Regular expression, searched in the name of every GPU of the node."""
    memory_gib: tuple[float, float] | None = None
    """Lowest and highest memory of a GPU in GiB; where it is not known, the size in the GPU's name counts."""
    compute_capability_min: float | None = None
    """Lowest CUDA compute capability; a GPU whose capability is not known passes."""
    count: tuple[int, int] | None = None
    """Fewest and most GPUs."""
    mig: bool | None = None
    """True: at least one GPU is in MIG mode. False: none is."""
    jetson: str = ""
    """Regular expression, searched in the Jetson's module (or, where that is not known, its device-tree model)."""
    architecture: tuple[str, ...] = ()
    """CPU architectures, as `x86_64` or `aarch64`."""

    @field_validator("accelerator", "jetson")
    @classmethod
    def _regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from error
        return value


@dataclass
class Verdict:
    """What a node made of a profile's rules."""

    failed: str = ""
    """The first rule that failed, in words."""
    held: list[str] = field(default_factory=list)
    other_kind: bool = False
    """The profile is for other hardware altogether, which is no news to anyone."""


Test = Callable[[Hardware], tuple[bool, str]]


def judge(rules: MatchRules, hardware: Hardware) -> Verdict:
    """Test the stated rules in order, up to the first that fails."""
    verdict = Verdict()
    for stated, names_kind, test in _tests(rules):
        if not stated:
            continue
        holds, words = test(hardware)
        if not holds:
            verdict.failed, verdict.other_kind = words, names_kind
            break
        verdict.held.append(words)
    return verdict


def _tests(rules: MatchRules) -> Iterator[tuple[bool, bool, Test]]:
    """(is the rule stated, does it name the kind of hardware, its test) of each rule."""
    yield bool(rules.jetson), True, lambda node: _test_jetson(rules.jetson, node)
    yield bool(rules.accelerator), True, lambda node: _test_name(rules.accelerator, node)
    yield rules.memory_gib is not None, False, lambda node: _test_memory(rules.memory_gib or (0, 0), node)
    yield rules.count is not None, False, lambda node: _test_count(rules.count or (0, 0), node)
    yield (
        rules.compute_capability_min is not None,
        False,
        lambda node: _test_cc(rules.compute_capability_min or 0, node),
    )
    yield rules.mig is not None, False, lambda node: _test_mig(bool(rules.mig), node)
    yield bool(rules.architecture), False, lambda node: _test_architecture(rules.architecture, node)


def ready(node: Hardware) -> list[Accelerator]:
    """The GPUs that a driver answers for; only they count."""
    return [gpu for gpu in node.accelerators if gpu.ready]


def _test_jetson(pattern: str, node: Hardware) -> tuple[bool, str]:
    if node.jetson is None:
        return False, "this is no Jetson"
    text = node.jetson.module or node.jetson.model or "a Jetson of unknown module"
    if re.search(pattern, text):
        return True, f"the board is {text}"
    return False, f"the board is {text}, which is not named like '{pattern}'"


def _test_name(pattern: str, node: Hardware) -> tuple[bool, str]:
    gpus = ready(node)
    if not gpus:
        return False, "no GPU with a driver was found"
    names = list(dict.fromkeys(gpu.name or "a GPU of unknown name" for gpu in gpus))
    others = [name for name in names if not re.search(pattern, name)]
    if others:
        return False, f"{', '.join(others)} is not named like '{pattern}'"
    return True, f"every GPU is {', '.join(names)}"


def _test_memory(span: tuple[float, float], node: Hardware) -> tuple[bool, str]:
    sizes = []
    for gpu in ready(node):
        named = re.search(r"(\d{1,4})\s?GB\b", gpu.name)
        if gpu.memory_bytes is not None:
            sizes.append(gpu.memory_bytes / GIB)
        elif named:
            sizes.append(float(named[1]))
        else:
            return False, f"the memory of {gpu.name or 'a GPU'} is not known"
    if not sizes:
        return False, "no GPU with a driver was found"
    words = f"GPU memory is {min(sizes):.0f} GiB"
    wanted = f"{span[0]:g} to {span[1]:g} GiB"
    if all(span[0] <= size <= span[1] for size in sizes):
        return True, f"{words} ({wanted} fit)"
    return False, f"{words}, not {wanted}"


def _test_cc(lowest: float, node: Hardware) -> tuple[bool, str]:
    known = [float(gpu.compute_capability) for gpu in ready(node) if gpu.compute_capability]
    if not known:
        return True, "compute capability is not known and taken as high enough"
    if min(known) < lowest:
        return False, f"compute capability {min(known):.1f} is below {lowest:.1f}"
    return True, f"compute capability {min(known):.1f} is at least {lowest:.1f}"


def _test_count(span: tuple[int, int], node: Hardware) -> tuple[bool, str]:
    count = len(ready(node))
    if span[0] <= count <= span[1]:
        return True, f"{count} GPU{'s' if count != 1 else ''}"
    if not count and node.accelerators:
        return False, f"no driver answers for what is on the PCI bus: {len(node.accelerators)} GPU(s)"
    if not count:
        return False, "no GPU with a driver was found"
    wanted = f"{span[0]}" if span[0] == span[1] else f"{span[0]} to {span[1]}"
    return False, f"{count} GPU{'s' if count != 1 else ''} found, not {wanted}"


def _test_mig(wanted: bool, node: Hardware) -> tuple[bool, str]:
    slices = sum(len(gpu.mig) for gpu in ready(node))
    enabled = any(gpu.mig_enabled for gpu in ready(node))
    words = f"MIG mode is on ({slices} slices)" if enabled else "MIG mode is off"
    return enabled == wanted, words


def _test_architecture(wanted: tuple[str, ...], node: Hardware) -> tuple[bool, str]:
    found = node.cpu.architecture or "not known"
    return found in wanted, f"the CPU's architecture is {found}"
