"""How well a model's outputs fit the truth, or the original's outputs. Python 3.10.

Classes are compared by the largest value, which a softmax does not change, so that logits need none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError

ACCURACY = "accuracy"
RMSE = "rmse"
AGREEMENT = "agreement"
PERPLEXITY = "perplexity"
"""Of language models, which their servers measure (language/perplexity.py)."""
WHOLE_PERCENT = 100.0

Outputs = Mapping[str, NDArray[Any]]


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, and how `[prediction]` of model.toml says that the output is read."""

    name: str
    """`accuracy`, `rmse`, or `agreement` with the original where no truth is known."""
    task: str = ""
    """`classification` or `regression`; empty where model.toml has no `[prediction]`: then all outputs are compared."""
    output: str = ""
    labels: int = 0
    scale: float = 1.0
    low: float | None = None
    high: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.name != RMSE


class Measured(NamedTuple):
    """One metric of two models on the same rows."""

    original: float
    candidate: float
    drop_percent: float
    """How much worse the candidate is, as a share of the original's value; below 0 is better."""


def measure(metric: Metric, original: Outputs, candidate: Outputs, truth: NDArray[Any] | None) -> Measured:
    """Compare. `truth`: (rows,) class numbers or values, None for agreement.

    Raises ModelError where an output has another shape than `[prediction]` says, or holds numbers that are not finite.
    """
    _check_finite("the original", original)
    _check_finite("the candidate", candidate)
    if metric.name == AGREEMENT:
        value = _agreement(metric, original, candidate)
        return Measured(1.0, value, WHOLE_PERCENT * (1.0 - value))
    assert truth is not None
    before, after = (_value(metric, outputs, truth) for outputs in (original, candidate))
    worse = before - after if metric.higher_is_better else after - before
    if before == 0:  # nothing to take a share of
        return Measured(before, after, WHOLE_PERCENT if worse > 0 else 0.0)
    return Measured(before, after, WHOLE_PERCENT * worse / before)


def measure_alone(metric: Metric, outputs: Outputs, truth: NDArray[Any] | None) -> float | None:
    """The metric of one model; None where it is agreement, which takes two. Raises ModelError as `measure`."""
    _check_finite("the original", outputs)
    if metric.name != AGREEMENT:
        assert truth is not None
        return _value(metric, outputs, truth)
    if metric.task:
        _read(metric, outputs, metric.labels or 1)
    return None


def _value(metric: Metric, outputs: Outputs, truth: NDArray[Any]) -> float:
    if metric.name == ACCURACY:
        return float(np.mean(_classes(metric, outputs) == truth))
    return float(np.sqrt(np.mean((_numbers(metric, outputs) - truth) ** 2)))


def _agreement(metric: Metric, original: Outputs, candidate: Outputs) -> float:
    """Classes: the share of rows that both put into the same class. Numbers: 1 less the root mean square of the
    difference as a share of the original's standard deviation, of the output where it is largest."""
    if metric.task == "classification":
        return float(np.mean(_classes(metric, original) == _classes(metric, candidate)))
    if metric.task == "regression":
        return _closeness(_numbers(metric, original), _numbers(metric, candidate))
    missing = [name for name in original if name not in candidate]
    if missing:
        raise ModelError(f"the candidate has no output '{missing[0]}'", hint="the maker must keep the outputs' names")
    return min(_closeness(original[name], candidate[name]) for name in original)


def _closeness(original: NDArray[Any], candidate: NDArray[Any]) -> float:
    if original.shape != candidate.shape:
        raise ModelError(
            f"an output has shape {list(candidate.shape)}, the original's has {list(original.shape)}",
            hint="the maker must keep the outputs' shapes",
        )
    if original.dtype == object:
        return float(np.mean(original == candidate))
    wanted, found = (np.asarray(array, np.float64) for array in (original, candidate))
    difference = float(np.sqrt(np.mean((wanted - found) ** 2)))
    spread = float(np.std(wanted))
    if spread == 0:
        return 1.0 if difference == 0 else 0.0
    return 1.0 - difference / spread


def _classes(metric: Metric, outputs: Outputs) -> NDArray[np.int64]:
    return np.asarray(_read(metric, outputs, metric.labels).argmax(axis=1))


def _numbers(metric: Metric, outputs: Outputs) -> NDArray[np.float64]:
    values = _read(metric, outputs, 1)[:, 0] * metric.scale
    if metric.low is not None or metric.high is not None:
        values = np.clip(values, metric.low, metric.high)
    return values


def _read(metric: Metric, outputs: Outputs, width: int) -> NDArray[np.float64]:
    """The output that `[prediction]` reads, as [rows, width]."""
    if metric.output not in outputs:
        raise ModelError(
            f"[prediction] output '{metric.output}' is not among {sorted(outputs)}", hint="mend model.toml"
        )
    array = outputs[metric.output]
    if array.ndim == 0 or array.size != len(array) * width:
        raise ModelError(
            f"output '{metric.output}' has shape {list(array.shape)}, [prediction] reads {width} value(s) a row",
            hint="mend [prediction] in model.toml, or the model",
        )
    return np.asarray(array, np.float64).reshape(len(array), width)


def _check_finite(whose: str, outputs: Outputs) -> None:
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            rows = int((~np.isfinite(array.reshape(len(array), -1)).all(axis=1)).sum())
            raise ModelError(
                f"output '{name}' of {whose} holds numbers that are not finite in {rows} of {len(array)} rows",
                hint="a value overflowed in the lower precision, or the model is damaged",
            )
