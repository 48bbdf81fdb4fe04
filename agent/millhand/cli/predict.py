"""`millhand predict`: one request to a served model."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from millhand.cli.output import Output, json_option, table
from millhand.errors import InputError

VALUES_SHOWN = 8


@click.command("predict")
@click.argument("model")
@click.option(
    "--input",
    "-i",
    "source",
    required=True,
    help="JSON of Open Inference Protocol v2 (- for stdin), or a .csv or .npy file for a model with one input.",
)
@click.option("--version", "version", type=int, help="A version; default: the newest that serves.")
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), help="Give up after so long.")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, source: str, version: int | None, deadline_ms: float | None) -> None:
    """Send one request to MODEL and print its outputs.

    A CSV row is one row of the batch, a first row that is no number is taken as a header; an array or a CSV row
    without the batch dimension is sent as a batch of one.
    """
    output: Output = ctx.obj
    daemon = output.daemon()
    if source == "-" or Path(source).suffix.lower() == ".json":
        request = _json_request(source)
    else:
        request = _array_request(Path(source), daemon.call("model.show", model=model)["inputs"], model)
    if deadline_ms is not None:
        request = {**request, "parameters": {**request.get("parameters", {}), "deadline_ms": deadline_ms}}
    response = daemon.call("model.infer", model=model, request=request, version=version)
    rows = [(item["name"], item["datatype"], str(item["shape"]), _short(item["data"])) for item in response["outputs"]]
    lines = [f"{response['model_name']} version {response['model_version']}"]
    output.emit(response, [*lines, *table(("output", "datatype", "shape", "values"), rows)])


def _json_request(source: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        request = json.loads(text, parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"'{source}' cannot be read: {error.strerror}", hint="give the path of a file") from error
    except ValueError as error:
        raise InputError(f"'{source}' is not valid JSON: {error}", hint="send an object with 'inputs'") from error
    if not isinstance(request, dict) or "inputs" not in request:
        raise InputError(
            f"'{source}' has no key 'inputs'",
            hint='{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        )
    return request


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _array_request(path: Path, inputs: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """A request from one array. Raises InputError where the model has several inputs, or the file does not fit."""
    import numpy as np

    if len(inputs) != 1:
        names = ", ".join(tensor["name"] for tensor in inputs)
        raise InputError(f"model '{model}' has the inputs {names}; '{path}' can carry one", hint="send JSON instead")
    spec = inputs[0]
    array = _read_npy(path) if path.suffix.lower() == ".npy" else np.asarray(_read_csv(path))
    if array.ndim == len(spec["shape"]) - 1:
        array = array[np.newaxis]
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise InputError(
            f"'{path}' holds something else than finite numbers", hint="fill gaps before you ask the model"
        )
    integers = spec["datatype"].startswith(("INT", "UINT"))
    data = array.ravel().astype(np.int64 if integers else np.float64).tolist()
    if spec["datatype"] == "BOOL":
        data = [bool(value) for value in data]
    tensor = {"name": spec["name"], "datatype": spec["datatype"], "shape": list(array.shape), "data": data}
    return {"inputs": [tensor]}


def _read_npy(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read as .npy: {error}", hint="write it with numpy.save") from error


def _read_csv(path: Path) -> list[list[float]]:
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' cannot be read as CSV: {error}", hint="give a UTF-8 file of numbers") from error
    rows: list[list[float]] = []
    for number, line in enumerate((line for line in lines if line), start=1):
        try:
            rows.append([float(cell) for cell in line])
        except ValueError as error:
            if number > 1:
                raise InputError(f"'{path}' row {number}: {error}", hint="every cell must be a number") from error
        if rows and len(rows[-1]) != len(rows[0]):
            raise InputError(f"'{path}' row {number} has {len(rows[-1])} cells, the first has {len(rows[0])}")
    if not rows:
        raise InputError(f"'{path}' holds no row of numbers", hint="give one row for each request row")
    return rows


def _short(data: list[Any]) -> str:
    shown = ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in data[:VALUES_SHOWN])
    return shown if len(data) <= VALUES_SHOWN else f"{shown}, … ({len(data)} values)"
