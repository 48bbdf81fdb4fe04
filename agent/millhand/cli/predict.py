"""`millhand predict`: one request to a served model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.files import TENSOR_FORMATS
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, table, wrapped
from millhand.errors import MillhandError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from millhand.pipeline.judgement import Answer

VALUES_SHOWN = 8
ROWS_SHOWN = 10
REQUEST_ELEMENTS_CAP = 1 << 20
"""A request to the daemon is JSON of at most 64 MiB; a number takes some 20 bytes."""


@click.command("predict")
@click.argument("model")
@click.option("--input", "-i", "source", default="-", help="A .json, .csv, .npy or .npz file. Default: stdin.")
@click.option(
    "--format", "-f", "kind", type=click.Choice(TENSOR_FORMATS), help="The input's format. Default: by its name."
)
@click.option("--output", "-o", "path", type=click.Path(path_type=Path), help="Write the outputs to this file too.")
@click.option("--version", "version", type=click.IntRange(1), help="Default: the newest that serves.")
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), help="Give up after so long.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    source: str,
    kind: str | None,
    path: Path | None,
    version: int | None,
    deadline_ms: float | None,
) -> None:
    """Send a request to MODEL and print what it says.

    JSON is a request of the Open Inference Protocol v2. A CSV line is one row; a header names the inputs, such as
    speed or features[0],features[1]; a model with one input needs none. An .npz holds one array an input; an array
    without the batch dimension is a batch of one. More rows than the model takes at once are sent in parts.

    --output writes .json, .csv, .npy or .npz, by its name.
    """
    from millhand.cli.tensor_files import (
        format_of,
        output_format_of,
        read_json,
        read_tensors,
        specs_of,
        write_outputs,
    )

    output: Output = ctx.obj
    if source == "-" and sys.stdin.isatty():
        raise click.UsageError("no --input is given, and stdin is a terminal")
    kind = format_of(source, kind)
    target = None if path is None else output_format_of(path)
    daemon = output.daemon()
    described = daemon.call("model.show", model=model)

    def ask(request: dict[str, Any], number: int | None) -> dict[str, Any]:
        if deadline_ms is not None:
            request = {**request, "parameters": {**request.get("parameters", {}), "deadline_ms": deadline_ms}}
        response: dict[str, Any] = daemon.call("model.infer", model=model, request=request, version=number)
        return response

    if kind == "json":
        response = ask(read_json(source), version)
    else:
        tensors = read_tensors(source, kind, specs_of(described["inputs"]))
        response = _in_parts(ask, tensors, described["max_batch"], version)
    lines = [f"{response['model_name']} version {response['model_version']}"]
    columns: dict[str, list[Any]] = {}
    try:
        answers = _read(model, described.get("prediction"), response)
        if answers:
            unit = described["prediction"].get("unit", "1")
            columns = _columns(answers, unit)
            response["predictions"] = [_prediction(answer, unit) for answer in answers]
            lines += ["", *_reading_lines(columns)]
    except MillhandError as error:
        lines += wrapped(f"No reading: {error.message}")
    rows = [(item["name"], item["datatype"], str(item["shape"]), _short(item["data"])) for item in response["outputs"]]
    lines += ["", *table(("output", "datatype", "shape", "values"), rows, LINE_CHARACTERS)]
    if path is not None and target is not None:
        write_outputs(path, target, response, columns)
        lines += ["", f"Written to {path}."]
    output.emit(response, lines)


def _in_parts(
    ask: Callable[[dict[str, Any], int | None], dict[str, Any]],
    tensors: Mapping[str, NDArray[Any]],
    max_batch: int,
    version: int | None,
) -> dict[str, Any]:
    """Send as many rows at once as the model takes; the parts go to one version and come back as one response."""
    from millhand.cli.tensor_files import request_of

    rows = len(next(iter(tensors.values())))
    row_elements = sum(array[:1].size for array in tensors.values())
    step = max(1, min(max_batch, REQUEST_ELEMENTS_CAP // max(row_elements, 1)))
    whole: dict[str, Any] = {}
    for first in range(0, rows, step):
        part = ask(request_of({name: array[first : first + step] for name, array in tensors.items()}), version)
        version = int(part["model_version"])
        if not whole:
            whole = part
            continue
        for mine, new in zip(whole["outputs"], part["outputs"], strict=True):
            mine["data"] += new["data"]
            mine["shape"][0] += new["shape"][0]
    return whole


# ---- what it says ---------------------------------------------------------------------------------------------------


def _read(model: str, prediction: Mapping[str, Any] | None, response: Mapping[str, Any]) -> Sequence[Answer | None]:
    """The answers as [prediction] in model.toml reads them; none without it. Raises ModelError."""
    from millhand.cli.tensor_files import outputs_of
    from millhand.pipeline.judgement import read_answers
    from millhand.serving.manifest import OutputSpec

    outputs = outputs_of(response)
    if not prediction or prediction["output"] not in outputs:
        return ()
    spec = OutputSpec.model_validate(prediction)
    return read_answers(model, spec, outputs, len(outputs[spec.output]))


def _prediction(answer: Answer | None, unit: str) -> dict[str, Any] | None:
    """For programs. The named values of a classification are probabilities."""
    if answer is None:
        return None
    values, kind, certainty = answer
    return {"label": kind, "certainty": certainty, "values": values} if kind else {"values": values, "unit": unit}


def _columns(answers: Sequence[Answer | None], unit: str) -> dict[str, list[Any]]:
    """For a table: label and certainty, or value and unit; empty where an output was not finite."""
    known = next(answer for answer in answers if answer is not None)
    if known[1]:
        return {
            "prediction": [answer[1] if answer else "" for answer in answers],
            "certainty": [answer[2] if answer else "" for answer in answers],
        }
    (name,) = known[0]
    values = [answer[0][name] if answer else "" for answer in answers]
    return {"prediction": [name] * len(answers), "value": values, "unit": [unit] * len(answers)}


def _reading_lines(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    count = len(columns["prediction"])
    said = [_said({name: values[row] for name, values in columns.items()}) for row in range(min(count, ROWS_SHOWN))]
    if count == 1:
        return wrapped(f"It says: {said[0]}.")
    lines = table(("row", "it says"), list(enumerate(said, start=1)), LINE_CHARACTERS)
    return lines if count <= ROWS_SHOWN else [*lines, f"… and {count - ROWS_SHOWN} more rows (--output, --json)"]


def _said(cells: Mapping[str, Any]) -> str:
    """One reading in words: `bearing outer, 97 % certain`, `rul 83.2 cycle`."""
    if "" in (cells.get("certainty", 0), cells.get("value", 0)):
        return "nothing: the output is not finite"
    if "certainty" in cells:
        return f"{cells['prediction'].replace('_', ' ')}, {_percent(cells['certainty'])} certain"
    unit = "" if cells["unit"] == "1" else f" {cells['unit']}"
    return f"{cells['prediction']} {cells['value']:.4g}{unit}"


def _percent(share: float) -> str:
    return ">99 %" if 0.995 <= share < 1 else f"{share:.0%}".replace("%", " %")


def _short(data: list[Any]) -> str:
    shown = ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in data[:VALUES_SHOWN])
    return shown if len(data) <= VALUES_SHOWN else f"{shown}, …"
