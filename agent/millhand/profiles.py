"""What suits a kind of hardware: `<board>.toml` files, and which of them fits this node.

A later folder wins over an earlier one of the same name, so an owner's folder can add profiles or replace shipped ones.
`extends` takes every key from another profile (or from the shipped one of the same name) that the file does not state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from millhand.errors import ConfigError, suggestion
from millhand.hardware import discover
from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Problem
from millhand.hardware.gpus import slice_bytes
from millhand.hardware.joined import Joined, best_sets, largest_by_nvlink
from millhand.hardware.visible import VARIABLE, device_names, find_device, visible_devices
from millhand.hardware_rules import MatchRules, judge, ready
from millhand.serving.settings import WorkerDefaults
from millhand.validation import StrictTable, read_toml, validate

if TYPE_CHECKING:
    from millhand.config import Config

COOL_IT = "check fans, filters and the air around the cabinet"
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]


class MemoryBudget(StrictTable):
    """How much accelerator memory models may take together."""

    fraction: float = Field(default=0.9, gt=0, le=1)
    """Share of the memory (of the available memory, if `unified`)."""
    reserve_bytes: int = Field(default=0, ge=0)
    """Kept free on top of that."""
    unified: bool = False
    """True where CPU and GPU share one memory: the budget is then taken from MemAvailable."""


class Worker(WorkerDefaults):
    """Defaults of workers; the owner's `[models]` wins. `profile`, `accelerator` and `cpus` are filled in by
    `match`."""

    isolation: Literal["shared", "accelerator"] = "shared"
    """`shared`: one worker on the CPU. `accelerator`: one for each GPU, or for each MIG slice of a GPU in MIG mode."""
    interpreters: dict[str, Path] = {}
    """JetPack's major version -> the Python whose TensorRT that JetPack brings."""
    near_cpus: bool = False
    """Pin a GPU's worker to the CPUs of its own NUMA node, where the topology is known."""


class Limits(StrictTable):
    """Where `check` warns, and what the board may draw."""

    warn_c: float | None = Field(default=None, gt=0, lt=150)
    """GPU temperature to warn at."""
    slowdown_c: float | None = Field(default=None, gt=0, lt=150)
    """GPU temperature at which the hardware lowers its clocks."""
    power_w: float | None = Field(default=None, gt=0)
    """Board power at the default limit (a Jetson: of the module at its highest power mode)."""

    def problems(self, hardware: Hardware) -> list[Problem]:
        """What is too hot now: each GPU, or on a Jetson its junction zone, which is its hottest sensor."""
        readings = {f"accelerators[{gpu.index}]": gpu.temperature_c for gpu in hardware.accelerators}
        if hardware.jetson is not None:
            readings["jetson"] = hardware.jetson.temperatures_c.get("tj")
        found = []
        for name, heat_c in readings.items():
            if heat_c is not None and self.slowdown_c is not None and heat_c >= self.slowdown_c:
                message = f"{heat_c:g} C: the hardware lowers its clocks from {self.slowdown_c:g} C on"
                found.append(Problem("temperature", name, message, COOL_IT))
            elif heat_c is not None and self.warn_c is not None and heat_c >= self.warn_c:
                found.append(Problem("temperature", name, f"{heat_c:g} C: warn from {self.warn_c:g} C on", COOL_IT))
        return found

    @model_validator(mode="after")
    def _warn_before_slowdown(self) -> Limits:
        if self.warn_c is not None and self.slowdown_c is not None and self.warn_c >= self.slowdown_c:
            raise ValueError(f"warn_c = {self.warn_c:g} must be below slowdown_c = {self.slowdown_c:g}")
        return self


class Language(StrictTable):
    """Language models on this board."""

    server: str = "llamacpp"
    """The language server's plugin."""
    precision: Precision = "int4"
    """Precision of the weights that suits the memory and its bandwidth."""
    context_tokens: int = Field(default=4096, ge=256)
    """Tokens that one conversation may hold, where the model allows it."""
    slots: int = Field(default=2, ge=1, le=1024)
    """Conversations that one process answers at once."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads on the CPU; 0 takes one for each core that may be used."""
    kv_bits: Literal[4, 8, 16] = 16
    """Bits of one number in the KV cache."""
    speculation: Literal["none", "ngram"] = "none"
    """Whether drafts are made from the text itself, where nothing was measured."""
    replicas: int = Field(default=1, ge=0, le=64)
    """Processes of one model; 0 takes as many as there are GPUs, or sets of them that it is spread over."""
    tensor_parallel_max: int = Field(default=1, ge=1)
    """GPUs that one model may be spread over, if NVLink joins them all."""
    memory_bandwidth_gb_s: float | None = Field(default=None, gt=0)
    """Bandwidth of the memory that holds the weights, GB/s (10^9 bytes); for estimates."""


class Profile(StrictTable):
    """One `<board>.toml`. Its name is the file's name without `.toml`."""

    name: str = ""
    description: str
    extends: str = ""
    match: MatchRules
    compute_capability: str = Field(default="", pattern=r"^([0-9]+\.[0-9])?$")
    """Of the board's GPU, such as `8.0`: what candidates are made for on a machine without it."""
    precisions: tuple[Precision, ...] = Field(min_length=1)
    """In order of preference; a model takes the first that it was proved in."""
    backends: tuple[str, ...] = Field(min_length=1)
    """In order of preference; a model takes the first that can run its artifact."""
    memory: MemoryBudget = MemoryBudget()
    worker: Worker = Worker()
    limits: Limits = Limits()
    language: Language = Language()

    def budget_bytes(self, hardware: Hardware, accelerator: Accelerator | MigInstance | None = None) -> int | None:
        """Memory that models may take on a GPU or slice (None: on the CPU); None where the size is not known."""
        main = hardware.memory
        if accelerator is None or self.memory.unified:
            sizes = [size for size in (main.available_bytes, main.limit_bytes) if size is not None]
            size = min(sizes) if sizes else None
        elif isinstance(accelerator, MigInstance):
            size = accelerator.memory_bytes or slice_bytes(accelerator.profile)
        else:
            size = accelerator.memory_bytes
        return None if size is None else max(0, int(size * self.memory.fraction) - self.memory.reserve_bytes)

    def tokens_per_s(self, weights_bytes: int) -> float | None:
        """Upper bound for one user: each token reads all weights once. None where the bandwidth is not known."""
        bandwidth = self.language.memory_bandwidth_gb_s
        return None if bandwidth is None else bandwidth * 1e9 / weights_bytes


@dataclass(frozen=True)
class Match:
    """The profile that fits a node, why, and what it means for the node's workers."""

    profile: Profile
    reasons: list[str] = field(default_factory=list)
    """In words: why this one (`name: why`, always there), why not the next, and what could not be had."""
    workers: tuple[WorkerDefaults, ...] = (WorkerDefaults(),)
    """One for each accelerator or MIG slice that the profile isolates, at least one."""
    tensor_parallel: int = 1
    """GPUs that one language model may be spread over on this node."""
    joined: tuple[Joined, ...] = ()
    """The GPUs that are joined best, for a model that is spread over 2, 4, 8, ... or all of them."""

    @property
    def worker(self) -> WorkerDefaults:
        """The first worker, which small models share."""
        return self.workers[0]


def profile_folders(config: Config) -> list[Path]:
    """The folders of the plugins that `config` names, then the owner's own folder. Raises PluginError."""
    from millhand.registry import Registry

    registry = Registry()
    registry.load(config.plugin_tables())
    folders = [Path(folder) for _, folder in registry.collect("millhand_profiles")]
    return [*folders, config.node.profiles_dir] if config.node.profiles_dir else folders


def match_node(config: Config) -> tuple[Hardware, Match]:
    """What this node is, and what suits it: as the daemon takes it. Raises ConfigError, or as `profile_folders`."""
    hardware, profiles = discover(config.node.hardware_root), load_profiles(profile_folders(config))
    visible = visible_devices(hardware, os.environ.get(VARIABLE))
    if config.node.profile != "auto":
        return hardware, profile_named(profiles, config.node.profile, hardware, visible)
    return hardware, match(profiles, hardware, visible)


def load_profiles(folders: Sequence[Path]) -> list[Profile]:
    """Read every `*.toml` of `folders`, highest priority first. Raises ConfigError naming file, key and value."""
    layers: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"profile folder '{folder}' does not exist", hint="create it, or mend profiles_dir")
        for path in sorted(folder.glob("*.toml")):
            layers.setdefault(path.stem, []).append((path, read_toml(path)))
    profiles = [_resolve(layers, name, len(found) - 1, ()) for name, found in layers.items()]
    loaded = [validate(Profile, {**data, "name": name}, f"profile '{path.name}'") for name, path, data in profiles]
    return sorted(loaded, key=lambda profile: (-profile.match.priority, profile.name))


def _resolve(
    layers: dict[str, list[tuple[Path, dict[str, Any]]]], name: str, layer: int, above: tuple[tuple[str, int], ...]
) -> tuple[str, Path, dict[str, Any]]:
    """Lay a profile's table over the one it extends. Each layer is checked for unknown keys under its own name."""
    path, data = layers[name][layer]
    source = f"profile '{path.name}'"
    base = data.get("extends", "")
    if not base:
        return name, path, data
    if base not in layers or (base == name and layer == 0):
        known = [other for other in layers if other != name]
        raise ConfigError(
            f"{source}: key 'extends' = '{base}' names no other profile{suggestion(str(base), known)}",
            hint="name a profile of `millhand profile list`",
        )
    place = (base, layer - 1 if base == name else len(layers[base]) - 1)
    if place in above:
        raise ConfigError(f"{source}: key 'extends' = '{base}' goes in a circle", hint="delete one of the two keys")
    _, base_path, base_data = _resolve(layers, *place, (*above, (name, layer)))
    validate(Profile, {**base_data, "name": base}, f"profile '{base_path.name}'")
    return name, path, _overlay(base_data, data)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _overlay(base[key], value) if both else value
    return merged


def match(profiles: Sequence[Profile], hardware: Hardware, visible: Sequence[str] | None = None) -> Match:
    """Take the matching profile of the highest priority. Raises ConfigError where none matches, or two tie.

    The whole node is matched; `visible` (see `millhand.hardware.visible`) then narrows its workers, None leaves all.
    """
    judged = [(profile, judge(profile.match, hardware)) for profile in profiles]
    fits = [(profile, verdict.held) for profile, verdict in judged if not verdict.failed]
    if not fits:
        hint = "add a profile without rules and with priority 0, such as the shipped generic-cpu"
        raise ConfigError("no profile matches this hardware", hint=hint)
    fits.sort(key=lambda item: -item[0].match.priority)
    best, reasons = fits[0]
    if len(fits) > 1 and fits[1][0].match.priority == best.match.priority:
        names = " and ".join(f"'{profile.name}'" for profile, _ in fits[:2])
        raise ConfigError(
            f"profiles {names} both match with priority {best.match.priority}",
            hint="give one of them a higher [match] priority, or name one as [node] profile",
        )
    why = [f"{best.name}: {'; '.join(reasons) or 'it fits any node'}"]
    for profile, verdict in judged:
        if verdict.failed and not verdict.other_kind and profile.match.priority >= best.match.priority:
            why.append(f"not {profile.name}: {verdict.failed}")
    if len(fits) > 1:
        why.append(f"not {fits[1][0].name}: it matches too, but {best.name} has the higher priority")
    return _fit(best, hardware, why, visible)


def profile_named(
    profiles: Sequence[Profile], name: str, hardware: Hardware | None = None, visible: Sequence[str] | None = None
) -> Match:
    """Take the profile that the owner named. Raises ConfigError with a suggestion."""
    for profile in profiles:
        if profile.name == name:
            return _fit(profile, hardware or Hardware(), [f"{name}: named by the configuration"], visible)
    raise ConfigError(
        f"profile '{name}' is not known{suggestion(name, [profile.name for profile in profiles])}",
        hint="millhand profile list",
    )


def _fit(profile: Profile, hardware: Hardware, reasons: list[str], visible: Sequence[str] | None) -> Match:
    """Fill in what only the node knows: accelerators, the interpreter, near CPUs, NVLink."""
    plain = {name: getattr(profile.worker, name) for name in WorkerDefaults.model_fields}
    plain["profile"] = profile.name
    plain["interpreter"] = _interpreter(profile, hardware, reasons)
    if hardware.cpu.usable and isinstance(profile.worker.threads, int):
        plain["threads"] = max(1, min(profile.worker.threads, int(hardware.cpu.usable)))
    workers = []
    if profile.worker.isolation == "accelerator":
        for gpu in ready(hardware):
            parts = [name for name in device_names(gpu) if visible is None or name in visible]
            if not all(part.uuid for part in gpu.mig):
                reasons.append(f"GPU {gpu.index}: the UUIDs of its MIG slices are not known, so no worker can use them")
            cpus = _near_cpus(hardware, gpu) if profile.worker.near_cpus else ()
            values = {**plain, "cpus": plain["cpus"] or cpus}
            for part in parts:
                budget = profile.budget_bytes(hardware, find_device(hardware, part)) or 0
                workers.append(WorkerDefaults(**{**values, "accelerator": part, "memory_bytes_cap": budget}))
    if visible is not None and ready(hardware):
        reasons.append(f"CUDA_VISIBLE_DEVICES leaves {', '.join(visible) or 'no GPU'}")
    whole = _whole_gpus(hardware, visible)
    tensor_parallel = 1
    if profile.language.tensor_parallel_max > 1 and len(whole) > 1:
        group = largest_by_nvlink(hardware.topology, whole)
        tensor_parallel = min(profile.language.tensor_parallel_max, group)
        if tensor_parallel == 1:
            known = len(hardware.topology.links) > 1
            link = "NVLink does not join the GPUs" if known else "the NVLink topology is not known"
            reasons.append(f"{link}, so a language model stays on one GPU")
    joined = tuple(best_sets(hardware.topology, whole))
    return Match(profile, reasons, tuple(workers) or (WorkerDefaults(**plain),), tensor_parallel, joined)


def _whole_gpus(hardware: Hardware, visible: Sequence[str] | None) -> list[int]:
    """The GPUs that may be used as a whole, by index: a model cannot be spread over MIG slices."""
    return [
        gpu.index
        for gpu in ready(hardware)
        if gpu.index is not None and not gpu.mig_enabled and (visible is None or device_names(gpu)[0] in visible)
    ]


def _interpreter(profile: Profile, hardware: Hardware, reasons: list[str]) -> Path | None:
    """The worker's Python: the one stated, else the one that suits the JetPack, if it is there."""
    if profile.worker.interpreter is not None or hardware.jetson is None or not profile.worker.interpreters:
        return profile.worker.interpreter
    major = hardware.jetson.jetpack.partition(".")[0]
    interpreter = profile.worker.interpreters.get(major)
    if interpreter is None:
        why = f"JetPack {major} brings no TensorRT for Python 3.10 or later" if major else "the JetPack is not known"
        reasons.append(f"{why}: workers use the agent's own Python")
    elif hardware.source == "live" and not interpreter.exists():
        reasons.append(f"{interpreter} is not installed: workers use the agent's own Python, without TensorRT")
        return None
    return interpreter


def _near_cpus(hardware: Hardware, gpu: Accelerator) -> tuple[int, ...]:
    affinity = hardware.topology.cpu_affinity
    if gpu.index is None or gpu.index >= len(affinity):
        return ()
    spans = re.findall(r"(\d{1,5})(?:-(\d{1,5}))?", affinity[gpu.index])
    near = [cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1)]
    # A container may be kept from some of them.
    allowed = os.sched_getaffinity(0) if hardware.source == "live" else set(near)
    return tuple(cpu for cpu in near if cpu in allowed)
