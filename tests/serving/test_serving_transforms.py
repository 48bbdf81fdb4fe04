"""Every transform: its numbers against NumPy's, what it says of shapes before it runs, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.serving.tensors import dtype_name, may_fit
from millhand.serving.transforms import TRANSFORMS, read_transform

NAN, INF = math.nan, math.inf


def array(*shape: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(7).normal(size=shape).astype(dtype)


X = array(3, 4, 10)
BAD = np.array([[1.0, NAN, -INF, 4.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "options", "x", "wanted"),
    [
        ("cast", {"datatype": "FP64"}, X, X.astype(np.float64)),
        ("cast", {"datatype": "INT32"}, np.float32([[1.9, -1.9]]), np.int32([[1, -1]])),
        ("cast", {"datatype": "FP16"}, np.float32([[1e9]]), np.float16([[INF]])),
        ("clip", {"low": -1}, BAD, np.float32([[1, NAN, -1, 4]])),
        ("fill", {"value": -5}, BAD, np.float32([[1, -5, -5, 4]])),
        ("normalise", {"mean": 2, "deviation": 4}, X, (X - np.float32(2)) / np.float32(4)),
        (
            "normalise",
            {"mean": [1, 2, 3, 4], "deviation": [1, 2, 1, 2], "axis": 1},
            X,
            (X - np.float32([[[1], [2], [3], [4]]])) / np.float32([[[1], [2], [1], [2]]]),
        ),
        ("normalise", {"deviation": 0.5}, np.float16([[1, 2]]), np.float16([[2, 4]])),
        ("normalise", {}, np.float32([[1, 3], [5, 5]]), np.float32([[-1, 1], [0, 0]])),
        ("softmax", {}, np.float32([[0, math.log(3)], [1000, 1000]]), np.float32([[0.25, 0.75], [0.5, 0.5]])),
        ("argmax", {}, np.float32([[1, 5, 5], [1, NAN, 9]]), np.int64([1, 1])),
        ("argmax", {"axis": 1}, X, X.argmax(1)),
        ("select", {"indices": [3, -4], "axis": 1}, X, X[:, [3, 0]]),
        ("select", {"indices": [0]}, np.array([[b"a", b"b"]], dtype=object), np.array([[b"a"]], dtype=object)),
        ("slice", {"start": -4, "step": 2}, X, X[:, :, -4::2]),
        ("slice", {"stop": 3, "axis": 1}, X, X[:, :3]),
        ("reshape", {"shape": [-1]}, X, X.reshape(3, 40)),
        ("reshape", {"shape": [2, -1, 5]}, X, X.reshape(3, 2, 4, 5)),
        ("reshape", {"shape": []}, np.float32([[1], [2]]), np.float32([1, 2])),
        ("transpose", {"axes": [2, 1]}, X, X.transpose(0, 2, 1)),
        ("resample", {"length": 5}, np.float32([[0, 4, 8]]), np.float32([[0, 2, 4, 6, 8]])),
        ("resample", {"length": 2}, np.float32([[0, 4, 8]]), np.float32([[0, 8]])),
        ("resample", {"length": 3}, np.float32([[5]]), np.float32([[5, 5, 5]])),
        ("resample", {"length": 7, "axis": 1}, np.ones_like(X), np.ones((3, 7, 10), np.float32)),
        ("resample", {"length": 10, "method": "fourier"}, X, X),
    ],
)  # fmt: skip
def test_one_to_one(name: str, options: dict[str, Any], x: Any, wanted: Any) -> None:
    before = x.copy()
    y = read_transform(name, options).run({"x": x})["y"]
    np.testing.assert_array_equal(y, wanted)
    assert y.dtype == wanted.dtype
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(("size", "length"), [(64, 32), (64, 96), (64, 33), (63, 32), (63, 100), (63, 21)])
def test_resampling_by_fourier_keeps_a_sine_and_drops_what_is_too_fast(size: int, length: int) -> None:
    slow, fast = (lambda n, k: np.sin(2 * np.pi * k * np.arange(n) / n + 0.3)), 20
    resample = read_transform("resample", {"length": length, "method": "fourier"})
    y = resample.run({"x": slow(size, 5)[None]})["y"]
    np.testing.assert_allclose(y[0], slow(length, 5), atol=1e-12)
    mixed = resample.run({"x": (slow(size, 5) + slow(size, fast))[None]})["y"]
    expected = slow(length, 5) + (slow(length, fast) if length > 2 * fast else 0)
    np.testing.assert_allclose(mixed[0], expected, atol=1e-12)


def test_resampling_by_fourier_there_and_back_changes_nothing_of_an_even_length() -> None:
    x = array(2, 16, dtype="float64")
    up = read_transform("resample", {"length": 32, "method": "fourier"}).run({"x": x})["y"]
    np.testing.assert_allclose(up[:, ::2], x, atol=1e-12)
    down = read_transform("resample", {"length": 16, "method": "fourier"}).run({"x": up})["y"]
    np.testing.assert_allclose(down, x, atol=1e-12)


def test_top_k_orders_values_with_their_indices() -> None:
    made = read_transform("top_k", {"k": 3}).run({"x": np.float32([[2, 7, NAN, 7], [NAN, NAN, -INF, 1]])})
    np.testing.assert_array_equal(made["values"], np.float32([[7, 7, 2], [1, -INF, NAN]]))
    np.testing.assert_array_equal(made["indices"], np.int64([[1, 3, 0], [3, 2, 0]]))


def test_concat_joins_in_the_order_of_its_inputs() -> None:
    made = read_transform("concat", {"axis": 1}).run({"b": X[:, :1], "a": X[:, 2:]})
    np.testing.assert_array_equal(made["y"], np.concatenate([X[:, :1], X[:, 2:]], axis=1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sofmax", {}, "transform 'sofmax' is not known; did you mean 'softmax'?"),
        ("softmax", {"axs": 1}, "option 'axs' is not known; did you mean 'axis'?"),
        ("softmax", {"axis": "last"}, "option 'axis': expected `int`, got `str`"),
        ("top_k", {}, "object missing required field `k`"),
        ("top_k", {"k": 0}, "option 'k': expected `int` >= 1"),
        ("cast", {"datatype": "FP99"}, "datatype 'FP99' is none of BOOL, "),
        ("cast", {"datatype": "BYTES"}, "datatype 'BYTES' is none of"),
        ("clip", {"low": 2, "high": 2}, "low = 2 must lie below high = 2"),
        ("normalise", {"deviation": [1, 0]}, "deviation must be above 0"),
        ("normalise", {"mean": []}, "mean must hold finite numbers"),
        ("normalise", {"mean": INF}, "mean must hold finite numbers"),
        ("select", {"indices": []}, "indices must name at least one element"),
        ("reshape", {"shape": [-1, -1]}, "must hold sizes above 0, and at most one -1"),
        ("transpose", {"axes": [0, 1]}, "must name each axis from 1 once"),
        ("resample", {"length": 5, "method": "cubic"}, "option 'method': invalid enum value 'cubic'"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_transform(name, options)


@pytest.mark.parametrize(
    ("name", "options", "spec", "message"),
    [
        ("softmax", {}, ("int64", (-1, 3)), "x is INT64; cast it to FP32 first"),
        ("softmax", {"axis": 0}, ("float32", (-1, 3)), "axis 0 of x is the batch: x has shape [-1, 3]"),
        ("argmax", {"axis": 2}, ("float32", (-1, 3)), "axis 2 of x is not there: x has shape [-1, 3]"),
        ("argmax", {}, ("float32", (-1,)), "axis -1 of x is the batch"),
        ("cast", {"datatype": "FP32"}, ("object", (-1, 3)), "x is BYTES, which holds no numbers"),
        ("normalise", {"mean": [1, 2]}, ("float32", (-1, 3)), "mean has 2 numbers, axis -1 of x has 3 elements"),
        ("top_k", {"k": 4}, ("float32", (-1, 3)), "k = 4, but axis -1 of x has 3 elements"),
        ("select", {"indices": [1, 3]}, ("float32", (-1, 3)), "index 3 is beyond axis -1 of x, which has 3 elements"),
        ("slice", {"start": 3}, ("float32", (-1, 3)), "nothing is left of axis -1 of x"),
        ("reshape", {"shape": [2, -1]}, ("float32", (-1, 3)), "a row of x has 3 elements, shape [2, -1] does not"),
        ("transpose", {"axes": [2, 1]}, ("float32", (-1, 3)), "axes [2, 1] do not fit x"),
        ("resample", {"length": 4}, ("float32", (-1, 0)), "axis -1 of x has no element"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_and_while_it_runs(
    name: str, options: dict[str, Any], spec: Any, message: str
) -> None:
    transform = read_transform(name, options)
    with pytest.raises(ValueError, match=re.escape(message)):
        transform.specs({"x": spec})
    dtype, shape = spec
    if dtype == "float32" and name not in ("normalise", "transpose"):  # NumPy's own words would do there
        with pytest.raises(ValueError, match=re.escape(message.partition(": x has")[0])):
            transform.run({"x": np.zeros((1, *shape[1:]), dtype)})


def test_concat_refuses_what_cannot_be_joined() -> None:
    concat = read_transform("concat", {"axis": 1})
    a = ("float32", (-1, 2, 3))
    assert concat.specs({"a": a, "b": ("float32", (-1, -1, 3))}) == {"y": ("float32", (-1, -1, 3))}
    assert concat.specs({"a": a, "b": ("float32", (-1, 4, -1))}) == {"y": ("float32", (-1, 6, 3))}
    for other, message in [
        (("int8", (-1, 2, 3)), "'b' is INT8, 'a' is FP32"),
        (("float32", (-1, 2, 4)), "'b' has shape [-1, 2, 4], 'a' has [-1, 2, 3]"),
        (("float32", (-1, 2)), "'b' has shape [-1, 2], 'a' has [-1, 2, 3]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            concat.specs({"a": a, "b": other})


def test_a_number_that_an_integer_cannot_hold_is_refused() -> None:
    for x in (np.float32([[NAN]]), np.float32([[1e20]])):
        with pytest.raises(ValueError, match="holds a number that INT32 cannot hold"):
            read_transform("cast", {"datatype": "INT32"}).run({"x": x})


EXAMPLES: dict[str, dict[str, Any]] = {
    "cast": {"datatype": "FP64"},
    "top_k": {"k": 2},
    "select": {"indices": [1, 0]},
    "slice": {"start": 1},
    "reshape": {"shape": [-1]},
    "transpose": {"axes": [2, 1]},
    "resample": {"length": 9},
}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(rows=st.integers(1, 4), time=st.integers(2, 6), hidden=st.sets(st.sampled_from([1, 2])))
def test_specs_foretell_what_run_gives_and_rows_stay_apart(name: str, rows: int, time: int, hidden: set[int]) -> None:
    transform = read_transform(name, EXAMPLES.get(name, {}))
    names = transform.takes or ("b", "a")
    inputs = {name: array(rows, 3, time) for name in names}
    shape = (-1, *(-1 if axis in hidden else size for axis, size in ((1, 3), (2, time))))
    specs = transform.specs(dict.fromkeys(names, ("float32", shape)))
    made = transform.run(inputs)
    assert list(made) == list(specs) == list(transform.gives)
    for output, y in made.items():
        dtype, foretold = specs[output]
        assert dtype_name(y.dtype) == dtype
        assert may_fit(y.shape, foretold)
        alone = [transform.run({name: x[row : row + 1] for name, x in inputs.items()})[output] for row in range(rows)]
        np.testing.assert_array_equal(y, np.concatenate(alone))
