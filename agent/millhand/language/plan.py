"""Which server serves the language model on this node, how, and why: from config, then profile, then the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millhand.errors import ConfigError, ModelError, suggestion
from millhand.hardware.joined import best_set
from millhand.hardware.visible import device_names, find_device
from millhand.language.launch import Launch
from millhand.language.library import LanguageModel, Library, open_library
from millhand.language.way import conditions

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.hardware.facts import Hardware
    from millhand.hookspecs import LanguageServer
    from millhand.language.settings import LanguageSettings
    from millhand.language.way import Way
    from millhand.profiles import Match
    from millhand.registry import Registry

WEIGHTS_SHARE_CAP = 0.7
"""Weights may take so much of the GPUs' budget; the rest is for the KV cache and what is computed with."""
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is started: a process for each launch, whose port is chosen then."""

    model: LanguageModel
    server: LanguageServer
    launches: tuple[Launch, ...]
    reasons: list[str] = field(default_factory=list)
    """In words: why this server, these GPUs, this context."""

    @property
    def head(self) -> Launch:
        """The first launch; the others differ in their GPUs only."""
        return self.launches[0]


def servers_of(registry: Registry) -> list[LanguageServer]:
    """The language servers of the plugins that are loaded."""
    return [server for _, server in registry.collect("millhand_language_servers")]


def plan_of(config: Config) -> tuple[Hardware, Match, Plan]:
    """As the daemon would plan, for who asks without one. Raises as `make_plan`, and PluginError."""
    from millhand.profiles import match_node
    from millhand.registry import Registry

    registry = Registry()
    registry.load(config.plugin_tables())
    hardware, match = match_node(config)
    return hardware, match, make_plan(config.language, open_library(config), servers_of(registry), match, hardware)


def make_plan(
    settings: LanguageSettings,
    library: Library,
    servers: Sequence[LanguageServer],
    match: Match,
    hardware: Hardware,
) -> Plan:
    """Choose. Raises ConfigError or ModelError, naming what is missing and the remedy."""
    model = library.model(settings.model)
    reasons: list[str] = []
    server = _server(settings, model, servers, match.profile.language.server, reasons)
    groups = _groups(settings, model, match, hardware, reasons)
    context_tokens = _context(settings, model, match, reasons)
    profile, target = match.profile.language, _target(match, hardware)
    served = library.served(model, target)
    if served.why:
        reasons.append(f"weights: {served.why}")
    under = conditions(settings, match.profile, hardware.cpu.model)
    way, why = library.way(model, target, served.sha256, server, under)
    if why:
        reasons.append(f"way: {why}")
    drafting = way.draft if way else settings.draft
    launches = tuple(
        Launch(
            name=model.name,
            model=served.path,
            port=0,
            context_tokens=context_tokens,
            slots=settings.slots or profile.slots,
            threads=settings.threads or profile.threads or _threads(hardware, groups, way),
            accelerators=group,
            kv_bits=settings.kv_bits or profile.kv_bits,
            speculation=way.speculation if way else settings.speculation or profile.speculation,
            draft=library.model(drafting).path if drafting else None,
            program=way.program if way else "",
            embeddings=model.manifest.embeddings,
            reasoning=model.manifest.reasoning,
        )
        for group in groups
    )
    if note := server.command(launches[0]).note:  # what cannot be started is said now
        reasons.append(note)
    return Plan(model, server, launches, reasons)


def _target(match: Match, hardware: Hardware) -> str:
    """The name of the shelf for where it serves."""
    from millhand.workshop.recipe import CPU
    from millhand.workshop.targets import node_targets

    target = node_targets(hardware, match).get(match.worker.accelerator)
    return target.name if target else CPU


def _server(
    settings: LanguageSettings,
    model: LanguageModel,
    servers: Sequence[LanguageServer],
    preferred: str,
    reasons: list[str],
) -> LanguageServer:
    names = [server.name for server in servers]
    if settings.server and settings.server not in names:
        raise ConfigError(
            f"[language] server = '{settings.server}' is not known{suggestion(settings.server, names)}",
            hint=f"one of: {', '.join(names) or 'none is loaded'}; a plugin's name brings it: [plugins.NAME]",
        )
    wanted = settings.server or preferred
    whose = "named by [language] server" if settings.server else "the profile's choice"
    ordered = sorted(servers, key=lambda server: server.name != wanted)
    against = []
    for server in ordered:
        if settings.server and server.name != wanted:
            break
        why_not = _why_not(server, model)
        if not why_not:
            reason = whose if server.name == wanted else f"the first that can serve '{model.name}' here"
            reasons.append(f"{server.name}: {reason}")
            return server
        against.append(f"{server.name}: {why_not}")
        reasons.append(f"not {against[-1]}")
    raise ModelError(
        f"no language server can serve '{model.name}' here: {'; '.join(against) or 'none is loaded'}",
        hint="pip install 'millhand[language]' brings one for GGUF files; millhand model catalog lists models that fit",
    )


def _why_not(server: LanguageServer, model: LanguageModel) -> str:
    if model.manifest.format not in server.formats:
        return f"it serves {' and '.join(server.formats)}, and the model is {model.manifest.format}"
    if model.manifest.embeddings and "embeddings" not in server.abilities:
        return "it does not embed"
    return server.missing()


def _context(settings: LanguageSettings, model: LanguageModel, match: Match, reasons: list[str]) -> int:
    wanted = settings.context_tokens or match.profile.language.context_tokens
    trained = model.manifest.context_tokens
    if trained and trained < wanted:
        reasons.append(f"context: {trained} tokens, which the model was trained for, not {wanted}")
        return trained
    return wanted


def _threads(hardware: Hardware, groups: Sequence[tuple[str, ...]], way: Way | None) -> int:
    """As was measured, of one process alone; else one for each core, shared by them; on a GPU the server's matter."""
    if groups[0]:
        return 0
    if way is not None and way.threads and len(groups) == 1:
        return way.threads
    return max(1, cores_of(hardware) // len(groups))


def cores_of(hardware: Hardware) -> int:
    """Cores that may be used."""
    usable = int(hardware.cpu.usable or 1)
    return max(1, min(usable, hardware.cpu.cores or usable))


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def _groups(
    settings: LanguageSettings, model: LanguageModel, match: Match, hardware: Hardware, reasons: list[str]
) -> list[tuple[str, ...]]:
    """The GPUs of each process; an empty tuple is a process on the CPU."""
    gpus = [worker.accelerator for worker in match.workers if worker.accelerator != "cpu"]
    replicas = settings.replicas if settings.replicas else match.profile.language.replicas
    if not gpus:
        if settings.tensor_parallel > 1:
            raise ConfigError(
                f"[language] tensor_parallel = {settings.tensor_parallel}, but this node has no GPU that it can use",
                hint="leave it out, or see millhand profile match",
            )
        return [()] * max(1, replicas)
    size = settings.tensor_parallel or _fewest(model, match, hardware, gpus, reasons)
    sets: list[tuple[str, ...]] = (
        [(gpu,) for gpu in gpus] if size == 1 else list(_joined_sets(hardware, gpus, size, settings, reasons))
    )
    if not sets or len(sets) < settings.replicas:
        raise ConfigError(
            f"[language] replicas = {max(settings.replicas, 1)} with tensor_parallel = {size} need "
            f"{max(settings.replicas, 1) * size} GPUs that are joined; this node has {len(gpus)} GPUs",
            hint="lower one of them, or leave both out",
        )
    return sets[: replicas or len(sets)]


def _fewest(model: LanguageModel, match: Match, hardware: Hardware, gpus: Sequence[str], reasons: list[str]) -> int:
    """The fewest GPUs that hold the model: replicas answer more than one process spread over as many."""
    weights = model.weights_bytes
    budget = match.profile.budget_bytes(hardware, find_device(hardware, gpus[0])) or 0
    size = 1
    while weights > WEIGHTS_SHARE_CAP * budget * size and 2 * size <= match.tensor_parallel:
        size *= 2
    if weights > WEIGHTS_SHARE_CAP * budget * size:
        room = f"{WEIGHTS_SHARE_CAP * budget * size / GIB:.1f} GiB"
        reasons.append(f"its weights take {weights / GIB:.1f} GiB, more than the {room} meant for them: it may not fit")
    elif size > 1:
        reasons.append(f"spread over {size} GPUs, the fewest that hold its {weights / GIB:.1f} GiB of weights")
    return size


def _joined_sets(
    hardware: Hardware, gpus: Sequence[str], size: int, settings: LanguageSettings, reasons: list[str]
) -> Iterator[tuple[str, ...]]:
    """Sets of `size` GPUs, the best joined first; only the owner may spread a model over GPUs without NVLink."""
    indices = {
        gpu.index: device_names(gpu)[0]
        for gpu in hardware.accelerators
        if gpu.index is not None and not gpu.mig_enabled and device_names(gpu)[0] in gpus
    }
    left = set(indices)
    while (found := best_set(hardware.topology, size, sorted(left))) is not None:
        if not found.by_nvlink:
            if not settings.tensor_parallel:
                return
            link = found.link or "links that are not known"
            reasons.append(
                f"GPUs {', '.join(map(str, found.gpus))} are joined by {link}, not NVLink: expect it to be slow"
            )
        yield tuple(indices[index] for index in found.gpus)
        left -= set(found.gpus)
