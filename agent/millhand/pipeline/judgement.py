"""From a model's raw output to a prediction: what [prediction] in model.toml says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand.serving.manifest import Manifest, OutputSpec

FAULT = "fault"

Answer = tuple[dict[str, float], str, float]
"""Named values, the chosen kind ("" for a regression), its confidence."""


def output_spec(manifest: Manifest) -> OutputSpec:
    """The model's [prediction]. Raises ModelError where it has none."""
    if manifest.prediction is None:
        raise ModelError(f"model '{manifest.name}' has no [prediction]", hint="add it to model.toml")
    return manifest.prediction


def judge(manifest: Manifest, outputs: Mapping[str, NDArray[Any]], rows: int) -> Sequence[Answer | None]:
    """`read_answers` of a model by its manifest."""
    return read_answers(manifest.name, output_spec(manifest), outputs, rows)


def read_answers(
    model: str, spec: OutputSpec, outputs: Mapping[str, NDArray[Any]], rows: int
) -> Sequence[Answer | None]:
    """Read `rows` answers of `model`; None for one that holds a number that is not finite, and so says nothing.

    outputs: output name -> [rows, ...]. classification: [rows, labels], probabilities or logits; values hold each
    label's probability and `fault` = 1 - healthy. regression: [rows] or [rows, 1]; the value is scaled and clipped.
    Raises ModelError for a missing output, a wrong shape, or where no row is finite.
    """
    tensor = outputs.get(spec.output)
    if tensor is None:
        raise ModelError(
            f"model '{model}': [prediction] output '{spec.output}' is not among {sorted(outputs)}",
            hint="mend model.toml",
        )
    width = len(spec.labels) if spec.task == "classification" else 1
    if tensor.size != rows * width:
        raise ModelError(
            f"model '{model}': output '{spec.output}' has shape {list(tensor.shape)}, wanted [{rows}, {width}]",
            hint="mend [prediction] in model.toml, or the model",
        )
    values = np.asarray(tensor, np.float64).reshape(rows, width)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    if rows and not finite.any():
        raise ModelError(
            f"model '{model}': output '{spec.output}' holds numbers that are not finite",
            hint="the model is damaged, or its input is far from what it was trained on",
        )
    read = _classes(spec, values[finite]) if spec.task == "classification" else _numbers(spec, values[finite, 0])
    answers = iter(read)
    return [next(answers) if usable else None for usable in finite]


def _classes(spec: OutputSpec, values: NDArray[np.float64]) -> list[Answer]:
    if spec.softmax:
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        values = powers / powers.sum(axis=1, keepdims=True)
    answers = []
    for row in values:
        best = int(row.argmax())
        named = dict(zip(spec.labels, row.tolist(), strict=True))
        if spec.healthy in named:
            named[FAULT] = 1.0 - named[spec.healthy]
        answers.append((named, spec.labels[best], float(row[best])))
    return answers


def _numbers(spec: OutputSpec, values: NDArray[np.float64]) -> list[Answer]:
    clipped = np.clip(values * spec.scale, spec.low, spec.high)
    return [({spec.value: value}, "", 1.0) for value in clipped.tolist()]


def fault_kind(spec: OutputSpec, values: Mapping[str, float]) -> str:
    """The most probable class other than the healthy one; "" for a regression."""
    faults = {label: values.get(label, 0.0) for label in spec.labels if label != spec.healthy}
    return max(faults, key=faults.__getitem__) if faults else ""
