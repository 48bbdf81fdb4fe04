"""Tensors as models and requests describe them: datatypes, shapes, and one check for both.

Imported by workers: Python 3.10, no records and no pydantic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, ModelError, suggestion

# Open Inference Protocol v2 names -> NumPy names
DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BYTES": "object",
}  # fmt: skip
DATATYPE_OF = {dtype: datatype for datatype, dtype in DATATYPES.items()}
# dtype.name is computed in Python at each access (5 us), dtype.char is not. `q` and `Q` are C's long long.
_NAME_OF = {np.dtype(name).char: name for name in DATATYPE_OF} | {"q": "int64", "Q": "uint64"}

Tensors = Mapping[str, NDArray[Any]]
Specs = Mapping[str, "tuple[str, tuple[int, ...]]"]
"""Tensor name -> (NumPy dtype name, shape; -1 for a free dimension, the first is the batch)."""


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The NumPy name of a dtype, quickly for those that can be served."""
    return _NAME_OF.get(dtype.char) or dtype.name


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether `shape` fits `wanted`, where -1 fits any size."""
    return len(shape) == len(wanted) and all(b in (-1, a) for a, b in zip(shape, wanted))  # noqa: B905 (lengths equal)


def may_fit(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can fit `wanted`, where -1 on either side may turn out to be any size."""
    return len(shape) == len(wanted) and all(a == b or -1 in (a, b) for a, b in zip(shape, wanted))  # noqa: B905


MAX_BATCH_KEY = "max_batch in model.toml"


def check_inputs(model: str, specs: Specs, tensors: Tensors, max_batch: int, max_batch_key: str = MAX_BATCH_KEY) -> int:
    """Check a request's tensors and return its number of rows.

    `max_batch_key`: what to raise for more than `max_batch` rows.

    Raises InputError naming the tensor, what came and what is expected.
    """
    rows = -1
    for name, array in tensors.items():
        spec = specs.get(name)
        if spec is None:
            raise InputError(
                f"model '{model}' has no input '{name}'{suggestion(name, specs)}",
                hint=f"send {', '.join(repr(known) for known in specs)}",
            )
        dtype, shape = spec
        if dtype_name(array.dtype) != dtype:
            raise InputError(
                f"tensor '{name}' of model '{model}' is {_datatype(array.dtype.name)}, expected {_datatype(dtype)}",
                hint=f"send it as {_datatype(dtype)}",
            )
        if not fits(array.shape, shape):
            raise InputError(
                f"tensor '{name}' of model '{model}' has shape {list(array.shape)}, expected {list(shape)}",
                hint="-1 stands for any size; the first dimension is the batch",
            )
        if rows not in (-1, array.shape[0]):
            raise InputError(
                f"tensor '{name}' of model '{model}' has {array.shape[0]} rows, another one has {rows}",
                hint="give all tensors the same first dimension",
            )
        rows = array.shape[0]
    missing = [name for name in specs if name not in tensors]
    if missing:
        raise InputError(f"tensor '{missing[0]}' of model '{model}' is missing", hint="send every input of the model")
    if rows < 1:
        raise InputError(f"the request to model '{model}' has 0 rows", hint="send at least one row in every tensor")
    if rows > max_batch:
        raise InputError(
            f"the request to model '{model}' has {rows} rows, allowed are 1 to {max_batch}",
            hint=f"split the request, or raise {max_batch_key}",
        )
    return rows


def unknown_output(model: str, name: str, outputs: Collection[str]) -> InputError:
    """The error of a request that asks for an output which the model does not give."""
    return InputError(
        f"model '{model}' has no output '{name}'{suggestion(name, outputs)}", hint=f"it gives {', '.join(outputs)}"
    )


def check_finite(model: str, names: Sequence[str], tensors: Tensors) -> None:
    """Check that these inputs hold numbers only. Raises InputError naming the tensor, the place and the value."""
    for name in names:
        finite = np.isfinite(tensors[name])
        if not finite.all():
            place = tuple(int(index) for index in np.argwhere(~finite)[0])
            raise InputError(
                f"tensor '{name}' of model '{model}' is {tensors[name][place]} at {list(place)}",
                hint="send finite numbers; model.toml says finite = true for this input",
            )


def check_session(model: str, role: str, declared: Specs, found: Specs) -> None:
    """Check what model.toml declares against what the artifact has. Raises ModelError naming the tensor."""
    for name, (dtype, shape) in declared.items():
        if name not in found:
            raise ModelError(
                f"model '{model}': the artifact has no {role} '{name}'{suggestion(name, found)}",
                hint=f"its {role}s are {', '.join(found)}; mend model.toml",
            )
        actual_dtype, actual_shape = found[name]
        if dtype != actual_dtype:
            raise ModelError(
                f"model '{model}': {role} '{name}' is {_datatype(actual_dtype)} in the artifact, "
                f"{_datatype(dtype)} in model.toml",
                hint="mend model.toml",
            )
        if not _compatible(shape, actual_shape):
            raise ModelError(
                f"model '{model}': {role} '{name}' has shape {list(actual_shape)} in the artifact, "
                f"{list(shape)} in model.toml",
                hint="mend model.toml, or export the model with a free batch dimension",
            )
    extra = [name for name in found if name not in declared]
    if extra and role == "input":
        raise ModelError(
            f"model '{model}': the artifact needs input '{extra[0]}', which model.toml does not declare",
            hint="add it to model.toml",
        )


def _compatible(declared: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """A free dimension of the artifact may be fixed by model.toml, not the other way round."""
    return len(declared) == len(found) and all(b in (-1, a) for a, b in zip(declared, found))  # noqa: B905


def _datatype(dtype: str) -> str:
    return DATATYPE_OF.get(dtype, dtype)


def zeros(specs: Specs, rows: int) -> dict[str, NDArray[Any]]:
    """Zeros for every input; free dimensions beside the batch get size 1."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape) in specs.items():
        full = (rows, *(max(size, 1) for size in shape[1:]))
        arrays[name] = np.full(full, b"", dtype=object) if dtype == "object" else np.zeros(full, dtype=dtype)
    return arrays
