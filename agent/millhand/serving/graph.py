"""How an ensemble's steps hang together: names, datatypes and shapes of every connection, checked before anything runs.

The daemon checks what model.toml files declare, a worker checks again with what the artifacts really have. Imported by
workers: Python 3.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from millhand.errors import ModelError, suggestion
from millhand.serving.tensors import DATATYPE_OF, Specs, fits, may_fit
from millhand.serving.transforms import Transform

Spec = tuple[str, tuple[int, ...]]
MaybeSpecs = Mapping[str, "Spec | None"]
"""Tensor name -> spec; None where it is not known before the artifact is loaded."""


class Part(Protocol):
    """What a step is to its neighbours."""

    @property
    def takes(self) -> MaybeSpecs | None:
        """Its inputs; None: those that the step names."""

    def gives(self, inputs: MaybeSpecs) -> MaybeSpecs | None:
        """Its outputs for these inputs; None: those that the step names. Raises ValueError where inputs do not fit."""


@dataclass(frozen=True)
class ModelPart:
    """A model, or an artifact whose tensors are known."""

    takes: Specs
    outputs: Specs

    def gives(self, inputs: MaybeSpecs) -> MaybeSpecs:
        return self.outputs


@dataclass(frozen=True)
class UnknownPart:
    """An artifact that is not loaded: its tensors are what the step says."""

    takes: None = None

    def gives(self, inputs: MaybeSpecs) -> None:
        return None


class TransformPart:
    """A transform: what it gives follows from what it gets."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self.takes: MaybeSpecs | None = dict.fromkeys(transform.takes) or None

    def gives(self, inputs: MaybeSpecs) -> MaybeSpecs:
        known = {name: spec for name, spec in inputs.items() if spec is not None}
        return self._transform.specs(known) if len(known) == len(inputs) else dict.fromkeys(self._transform.gives)


@dataclass(frozen=True)
class Node:
    """One step as model.toml wires it."""

    label: str
    """Number and name: `2 (softmax)`."""
    part: Part
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Step input -> tensor; an input that is not named takes the tensor of its own name."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Step output -> tensor, of those that are kept; empty keeps all under their own names."""


@dataclass(frozen=True)
class Wiring:
    """One step's connections."""

    inputs: tuple[tuple[str, str], ...]
    """(step input, tensor)."""
    outputs: tuple[tuple[str, str], ...]
    """(step output, tensor)."""
    checks: tuple[tuple[str, tuple[int, ...]], ...]
    """(tensor, shape) of those inputs whose shape can only be checked while it runs."""


def connect(source: str, inputs: Specs, outputs: Specs, nodes: Sequence[Node]) -> tuple[list[Wiring], Wiring]:
    """Check an ensemble and return each step's connections, and those of the ensemble's outputs (as its `inputs`).

    `source` names the model.toml in messages. Raises ModelError naming it, the step and the tensor: for an input or
    output that a step does not have, a tensor that is made by no step, later, twice, or for nothing, and for a datatype
    or shape that does not fit.
    """
    graph = _Graph(source, inputs, nodes)
    wirings = [graph.add(node) for node in nodes]
    return wirings, graph.finish(outputs)


class _Graph:
    def __init__(self, source: str, inputs: Specs, nodes: Sequence[Node]) -> None:
        self._source = source
        self._nodes = nodes
        self._made: dict[str, Spec | None] = dict(inputs)
        self._makers = dict.fromkeys(inputs, "the ensemble's inputs")
        self._inputs = tuple(inputs)
        self._used: set[str] = set()

    def add(self, node: Node) -> Wiring:
        where, part = f"{self._source}: step {node.label}", node.part
        names = tuple(node.inputs if part.takes is None else part.takes)
        if not names or (isinstance(part, UnknownPart) and not node.outputs):
            raise ModelError(
                f"{where} names no {'outputs' if names else 'inputs'}", hint="they follow from nothing else: write them"
            )
        for name in node.inputs:
            if name not in names:
                raise ModelError(
                    f"{where} has no input '{name}'{suggestion(name, names)}",
                    hint=f"it takes {', '.join(names)}; mend the step's inputs",
                )
        pairs = tuple((name, node.inputs.get(name, name)) for name in names)
        checks = [self._use(where, name, tensor, part.takes[name] if part.takes else None) for name, tensor in pairs]
        try:
            given = part.gives({name: self._made[tensor] for name, tensor in pairs})
        except ValueError as error:
            tensors = " and ".join(f"'{tensor}' as {name}" for name, tensor in pairs)
            raise ModelError(
                f"{where}: {error} (it takes {tensors})", hint="mend the step's inputs or options"
            ) from error
        if given is None:
            given = dict.fromkeys(node.outputs)
        kept = tuple((node.outputs or {name: name for name in given}).items())
        for name, tensor in kept:
            self._make(where, node.label, name, tensor, given)
        return Wiring(pairs, kept, tuple(check for check in checks if check))

    def finish(self, outputs: Specs) -> Wiring:
        pairs, checks = [], []
        for name, spec in outputs.items():
            if name in self._inputs:
                raise ModelError(
                    f"{self._source}: output '{name}' is an input of the ensemble, no step makes it",
                    hint="give the output another name, and let a step make it",
                )
            pairs.append((name, name))
            checks.append(self._use(f"{self._source}: [[outputs]]", name, name, spec))
            made = self._made[name]
            if made is not None and not fits(spec[1], made[1]):
                raise ModelError(
                    f"{self._source}: output '{name}' has shape {list(made[1])} out of step {self._makers[name]}, "
                    f"{list(spec[1])} in [[outputs]]",
                    hint="declare the shape that the step gives",
                )
        for tensor, maker in self._makers.items():
            if tensor not in self._used:
                who = maker if tensor in self._inputs else f"step {maker}"
                raise ModelError(
                    f"{self._source}: tensor '{tensor}' of {who} is used by no step and is no output",
                    hint="use it, or take it out; a step's `outputs` name those of its outputs that are kept",
                )
        return Wiring(tuple(pairs), (), tuple(check for check in checks if check))

    def _use(self, where: str, name: str, tensor: str, wanted: Spec | None) -> tuple[str, tuple[int, ...]] | None:
        """Take a tensor; returns what must be checked while it runs, if anything."""
        if tensor not in self._made:
            raise self._missing(where, name, tensor)
        self._used.add(tensor)
        have = self._made[tensor]
        if wanted is None:
            return None
        if wanted[1][:1] != (-1,):
            raise self._fixed_batch(where, "input", name, wanted[1])
        if have is None:
            return tensor, wanted[1]
        maker = self._makers[tensor]
        origin = maker if tensor in self._inputs else f"step {maker}"
        if have[0] != wanted[0]:
            raise ModelError(
                f"{where}: '{name}' is {_datatype(wanted)}, but tensor '{tensor}' of {origin} is {_datatype(have)}",
                hint="put a step with transform = 'cast' between them, or connect another tensor",
            )
        if not may_fit(have[1], wanted[1]):
            raise ModelError(
                f"{where}: '{name}' has shape {list(wanted[1])}, but tensor '{tensor}' of {origin} "
                f"has shape {list(have[1])}",
                hint="put a step with transform = 'reshape' between them, or connect another tensor",
            )
        return None if fits(have[1], wanted[1]) else (tensor, wanted[1])

    def _make(self, where: str, label: str, name: str, tensor: str, given: MaybeSpecs) -> None:
        if name not in given:
            raise ModelError(
                f"{where} has no output '{name}'{suggestion(name, given)}",
                hint=f"it gives {', '.join(given)}; mend the step's outputs",
            )
        if tensor in self._made:
            maker = self._makers[tensor]
            raise ModelError(
                f"{where}: output '{name}' makes tensor '{tensor}', which "
                f"{'is an input of the ensemble' if tensor in self._inputs else f'step {maker} has made'}",
                hint=f'give it another name: outputs = {{ {name} = "…" }}',
            )
        spec = given[name]
        if spec is not None and spec[1][:1] != (-1,):
            raise self._fixed_batch(where, "output", name, spec[1])
        self._made[tensor] = spec
        self._makers[tensor] = label

    def _missing(self, where: str, name: str, tensor: str) -> ModelError:
        for node in self._nodes:
            if tensor in node.outputs.values() and node.label not in self._makers.values():
                return ModelError(
                    f"{where}: '{name}' takes tensor '{tensor}', which step {node.label} makes only later",
                    hint="put the steps in the order in which they run",
                )
        return ModelError(
            f"{where}: '{name}' takes tensor '{tensor}', which no input and no step makes"
            f"{suggestion(tensor, self._made)}",
            hint=f"there are {', '.join(self._made)}; name one of them, or let a step make it",
        )

    def _fixed_batch(self, where: str, role: str, name: str, shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"{where}: {role} '{name}' has shape {list(shape)}, which has no free batch dimension",
            hint="export the model with a free first dimension on every input and output",
        )


def _datatype(spec: Spec) -> str:
    return DATATYPE_OF.get(spec[0], spec[0])
