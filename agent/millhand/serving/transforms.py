"""Built-in steps of an ensemble: pure NumPy functions with checked options. Imported by workers: Python 3.10.

A transform takes tensors whose first dimension is the batch, keeps the rows apart and in order, computes in the
datatype it is given, writes to none of its inputs and gives arrays in row-major order. Where nothing else is said it
takes `x` and gives `y`. Axes count from the batch, which is 0 and may not be named; negative ones count from the end.

`specs` says what comes out for what comes in before anything runs, `run` computes it. Both raise ValueError; so does
`read_transform`, naming the option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import suggestion
from millhand.serving.tensors import DATATYPE_OF, DATATYPES, Tensors, may_fit

Array = NDArray[Any]
Positive = Annotated[int, msgspec.Meta(ge=1)]

FLOATS = ("float16", "float32", "float64")


class Transform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One transform with its options as fields."""

    takes: ClassVar[tuple[str, ...]] = ("x",)
    """Input names; none: as many as the step names, in its order."""
    gives: ClassVar[tuple[str, ...]] = ("y",)

    def specs(self, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Input specs (NumPy dtype name, shape with -1 for a free dimension) to output specs."""
        return {"y": self.spec(*inputs["x"])}

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Compute one batch."""
        return {"y": self.apply(inputs["x"])}

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """`specs` of one input and one output."""
        raise NotImplementedError

    def apply(self, x: Array) -> Array:
        """`run` of one input and one output."""
        raise NotImplementedError


# ---- values ---------------------------------------------------------------------------------------------------------


class Cast(Transform, frozen=True):
    """x as another datatype. Fractions are cut off; a value that an integer cannot hold is refused.

    FP32 beyond FP16's range becomes infinite; an integer beyond a smaller one's range wraps around.
    """

    datatype: str

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES or self.datatype == "BYTES":
            known = ", ".join(name for name in DATATYPES if name != "BYTES")
            raise ValueError(f"datatype '{self.datatype}' is none of {known}")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        _numbers_only(dtype)
        return DATATYPES[self.datatype], shape

    def apply(self, x: Array) -> Array:
        try:
            with np.errstate(invalid="raise", over="ignore"):
                return np.ascontiguousarray(x, DATATYPES[self.datatype])
        except FloatingPointError as error:
            raise ValueError(f"x holds a number that {self.datatype} cannot hold") from error


class Clip(Transform, frozen=True):
    """x kept within low..high; NaN stays NaN."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} must lie below high = {self.high:g}")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return _floats_only(dtype), shape

    def apply(self, x: Array) -> Array:
        return np.asarray(np.clip(x, x.dtype.type(self.low), x.dtype.type(self.high)))


class Fill(Transform, frozen=True):
    """x with `value` in place of everything that is not finite: what a lost sensor leaves."""

    value: float = 0.0

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return _floats_only(dtype), shape

    def apply(self, x: Array) -> Array:
        return np.where(np.isfinite(x), x, x.dtype.type(self.value))


class Normalise(Transform, frozen=True):
    """(x - mean) / deviation. Lists lie along `axis`, one number an element; a number holds for all.

    With neither, each row is brought to mean 0 and deviation 1 along `axis`, a constant one to 0.
    """

    mean: float | tuple[float, ...] | None = None
    deviation: float | tuple[float, ...] | None = None
    axis: int = -1

    def __post_init__(self) -> None:
        for name, given in (("mean", self.mean), ("deviation", self.deviation)):
            numbers = given if isinstance(given, tuple) else () if given is None else (given,)
            if given == () or not all(math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} must hold finite numbers")
            if name == "deviation" and any(number <= 0 for number in numbers):
                raise ValueError("deviation must be above 0")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        size = shape[_place(self.axis, shape)]
        for name, given in (("mean", self.mean), ("deviation", self.deviation)):
            if isinstance(given, tuple) and size not in (-1, len(given)):
                raise ValueError(f"{name} has {len(given)} numbers, axis {self.axis} of x has {size} elements")
        return _floats_only(dtype), shape

    def apply(self, x: Array) -> Array:
        place = _place(self.axis, x.shape)
        if self.mean is None and self.deviation is None:
            centred = x - x.mean(axis=place, keepdims=True)
            deviation = np.sqrt(np.mean(np.square(centred), axis=place, keepdims=True))
            return np.asarray(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0))
        mean = 0.0 if self.mean is None else self.mean
        deviation = 1.0 if self.deviation is None else self.deviation
        return (x - _along(mean, place, x)) / _along(deviation, place, x)


class Softmax(Transform, frozen=True):
    """exp(x) over its sum along `axis`: logits to probabilities."""

    axis: int = -1

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        _place(self.axis, shape)
        return _floats_only(dtype), shape

    def apply(self, x: Array) -> Array:
        place = _place(self.axis, x.shape)
        powers = np.exp(x - x.max(axis=place, keepdims=True, initial=-np.inf))
        return np.asarray(powers / powers.sum(axis=place, keepdims=True))


class Argmax(Transform, frozen=True):
    """Index of the largest element along `axis`, INT64, without that axis; the first of equals, or the first NaN."""

    axis: int = -1

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        _numbers_only(dtype)
        place = _place(self.axis, shape)
        return "int64", shape[:place] + shape[place + 1 :]

    def apply(self, x: Array) -> Array:
        return np.asarray(x.argmax(axis=_place(self.axis, x.shape)))


class TopK(Transform, frozen=True):
    """The k largest along `axis` in falling order as `values`, and where they lay as `indices`, INT64.

    Of equals the first comes first; NaN comes last.
    """

    gives: ClassVar[tuple[str, ...]] = ("values", "indices")

    k: Positive
    axis: int = -1

    def specs(self, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        dtype, shape = inputs["x"]
        place = _place(self.axis, shape)
        self._check(shape[place])
        cut = (*shape[:place], self.k, *shape[place + 1 :])
        return {"values": (_floats_only(dtype), cut), "indices": ("int64", cut)}

    def run(self, inputs: Tensors) -> dict[str, Array]:
        x = inputs["x"]
        place = _place(self.axis, x.shape)
        self._check(x.shape[place])
        order = np.argsort(-x, axis=place, kind="stable").take(range(self.k), axis=place)
        return {"values": np.take_along_axis(x, order, place), "indices": order.astype(np.int64)}

    def _check(self, size: int) -> None:
        if size != -1 and size < self.k:
            raise ValueError(f"k = {self.k}, but axis {self.axis} of x has {size} elements")


# ---- shapes ---------------------------------------------------------------------------------------------------------


class Select(Transform, frozen=True):
    """The elements at `indices` along `axis`, in that order; negative ones count from the end."""

    indices: tuple[int, ...]
    axis: int = -1

    def __post_init__(self) -> None:
        if not self.indices:
            raise ValueError("indices must name at least one element")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        place = _place(self.axis, shape)
        self._check(shape[place])
        return dtype, (*shape[:place], len(self.indices), *shape[place + 1 :])

    def apply(self, x: Array) -> Array:
        place = _place(self.axis, x.shape)
        self._check(x.shape[place])
        return x.take(self.indices, axis=place)

    def _check(self, size: int) -> None:
        beyond = [index for index in self.indices if size != -1 and not -size <= index < size]
        if beyond:
            raise ValueError(f"index {beyond[0]} is beyond axis {self.axis} of x, which has {size} elements")


class Slice(Transform, frozen=True):
    """The elements from `start` up to, not with, `stop` along `axis`, every `step`-th; as Python's slices count."""

    start: int | None = None
    stop: int | None = None
    step: Positive = 1
    axis: int = -1

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        place = _place(self.axis, shape)
        size = -1 if shape[place] == -1 else self._size(shape[place])
        return dtype, (*shape[:place], size, *shape[place + 1 :])

    def apply(self, x: Array) -> Array:
        place = _place(self.axis, x.shape)
        self._size(x.shape[place])
        return np.ascontiguousarray(x[(slice(None),) * place + (slice(self.start, self.stop, self.step),)])

    def _size(self, size: int) -> int:
        left = len(range(size)[self.start : self.stop : self.step])
        if left == 0:
            raise ValueError(f"nothing is left of axis {self.axis} of x, which has {size} elements")
        return left


class Concat(Transform, frozen=True):
    """All inputs, in the order of the step's `inputs`, one after another along `axis`."""

    takes: ClassVar[tuple[str, ...]] = ()

    axis: int = -1

    def specs(self, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        (first, (dtype, shape)), *others = inputs.items()
        place = _place(self.axis, shape)
        joined = list(shape)
        for name, (other_dtype, other) in others:
            if other_dtype != dtype:
                raise ValueError(f"'{name}' is {DATATYPE_OF[other_dtype]}, '{first}' is {DATATYPE_OF[dtype]}")
            beside = [size if axis != place else -1 for axis, size in enumerate(other)]
            if not may_fit(shape, tuple(beside)):
                raise ValueError(f"'{name}' has shape {list(other)}, '{first}' has {list(shape)}")
            joined[place] = -1 if -1 in (joined[place], other[place]) else joined[place] + other[place]
        return {"y": (dtype, tuple(joined))}

    def run(self, inputs: Tensors) -> dict[str, Array]:
        arrays = list(inputs.values())
        return {"y": np.concatenate(arrays, axis=_place(self.axis, arrays[0].shape))}


class Reshape(Transform, frozen=True):
    """The elements of each row in `shape`, which does not count the batch; one size may be -1: what is left."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.shape.count(-1) > 1 or any(size == 0 or size < -1 for size in self.shape):
            raise ValueError(f"shape {list(self.shape)} must hold sizes above 0, and at most one -1")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if -1 in shape[1:]:
            return dtype, (-1, *self.shape)
        return dtype, (-1, *self._sizes(shape))

    def apply(self, x: Array) -> Array:
        return np.ascontiguousarray(x).reshape(x.shape[0], *self._sizes(x.shape))

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        elements = math.prod(shape[1:])
        known = math.prod(size for size in self.shape if size != -1)
        if elements % known or (-1 not in self.shape and elements != known):
            raise ValueError(f"a row of x has {elements} elements, shape {list(self.shape)} does not hold them")
        return tuple(elements // known if size == -1 else size for size in self.shape)


class Transpose(Transform, frozen=True):
    """x with its axes in the order `axes`, the batch left out: [2, 1] makes [n, time, channel] [n, channel, time]."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(1, len(self.axes) + 1)):
            raise ValueError(f"axes {list(self.axes)} must name each axis from 1 once")

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if len(shape) != len(self.axes) + 1:
            raise ValueError(f"axes {list(self.axes)} do not fit x, which has shape {list(shape)}")
        return dtype, (shape[0], *(shape[axis] for axis in self.axes))

    def apply(self, x: Array) -> Array:
        return np.ascontiguousarray(x.transpose(0, *self.axes))


class Resample(Transform, frozen=True):
    """x with `length` elements along `axis`, evenly spaced.

    linear: from the first to the last element, straight lines between neighbours; nothing is filtered, so take it for
    slow signals. fourier: band-limited over one period, which ends one spacing after the last element; for vibration
    and sound, since nothing above the new half rate comes back as another frequency.
    """

    length: Positive
    method: Literal["linear", "fourier"] = "linear"
    axis: int = -1

    def spec(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        place = _place(self.axis, shape)
        self._check(shape[place])
        return _floats_only(dtype), (*shape[:place], self.length, *shape[place + 1 :])

    def apply(self, x: Array) -> Array:
        place = _place(self.axis, x.shape)
        size = x.shape[place]
        self._check(size)
        if size == self.length:
            return x
        resampled = _linear if self.method == "linear" else _fourier
        return np.ascontiguousarray(np.moveaxis(resampled(np.moveaxis(x, place, -1), self.length), -1, place), x.dtype)

    def _check(self, size: int) -> None:
        if size == 0:
            raise ValueError(f"axis {self.axis} of x has no element")


def _linear(x: Array, length: int) -> Array:
    """x: [..., n] to [..., length]."""
    last = x.shape[-1] - 1
    positions = np.linspace(0, last, length)
    below = np.minimum(positions.astype(np.intp), max(last - 1, 0))
    share = (positions - below).astype(x.dtype)
    low, high = x[..., below], x[..., np.minimum(below + 1, last)]
    return np.asarray(low + (high - low) * share)


def _fourier(x: Array, length: int) -> Array:
    """x: [..., n] to [..., length], by cutting or padding the spectrum.

    Where the shorter of both lengths is even, its last bin stands for two frequencies of the longer one, and counts so.
    """
    size = x.shape[-1]
    shorter = min(size, length)
    bins = np.fft.rfft(x)[..., : shorter // 2 + 1]
    if shorter % 2 == 0:
        bins[..., -1] *= 2.0 if length < size else 0.5
    return np.asarray(np.fft.irfft(bins, length) * (length / size))


# ---- names and options ----------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, type[Transform]] = {
    "argmax": Argmax,
    "cast": Cast,
    "clip": Clip,
    "concat": Concat,
    "fill": Fill,
    "normalise": Normalise,
    "reshape": Reshape,
    "resample": Resample,
    "select": Select,
    "slice": Slice,
    "softmax": Softmax,
    "top_k": TopK,
    "transpose": Transpose,
}


def read_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """Make a transform from what model.toml says. Raises ValueError naming the transform, or the option."""
    kind = TRANSFORMS.get(name)
    if kind is None:
        raise ValueError(f"transform '{name}' is not known{suggestion(name, TRANSFORMS)}")
    for key in options:
        if key not in kind.__struct_fields__:
            raise ValueError(f"option '{key}' is not known{suggestion(key, kind.__struct_fields__)}")
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        message = f"{message[:1].lower()}{message[1:]}"
        raise ValueError(f"option '{path.rstrip('`')}': {message}" if path else message) from error


def _place(axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from the batch."""
    place = axis + len(shape) if axis < 0 else axis
    if not 0 < place < len(shape):
        what = "is the batch" if place == 0 else "is not there"
        raise ValueError(f"axis {axis} of x {what}: x has shape {list(shape)}")
    return place


def _along(numbers: float | tuple[float, ...], place: int, x: Array) -> Array:
    """Numbers in the shape and datatype to be broadcast along one axis of x."""
    array = np.asarray(numbers, dtype=x.dtype)
    if array.ndim and array.size != x.shape[place]:
        raise ValueError(f"{array.size} numbers are given, axis {place} of x has {x.shape[place]} elements")
    return array if not array.ndim else array.reshape([-1 if axis == place else 1 for axis in range(x.ndim)])


def _floats_only(dtype: str) -> str:
    if dtype not in FLOATS:
        raise ValueError(f"x is {DATATYPE_OF[dtype]}; cast it to FP32 first")
    return dtype


def _numbers_only(dtype: str) -> None:
    if dtype == "object":
        raise ValueError("x is BYTES, which holds no numbers")
