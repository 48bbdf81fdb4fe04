"""`millhand model bench`: how fast a served model answers."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from millhand.cli.files import TENSOR_FORMATS
from millhand.cli.output import Output, json_option, labelled, plural, wrapped
from millhand.errors import InputError, ModelError

if TYPE_CHECKING:
    from millhand.serving.bench import Line, Plan, Tally
    from millhand.serving.tensors import Tensors

OPEN_LOOP_CONCURRENCY = 64


def finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse what FloatRange lets pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number", ctx, parameter)
    return value


@click.command("bench", short_help="Measure how fast a model answers.")
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Default: the newest that serves.")
@click.option("--concurrency", "-n", type=click.IntRange(1, 1024), help="Requests in flight. Default: 1.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Rows of one request.")
@click.option(
    "--seconds", type=click.FloatRange(0, 86_400, min_open=True), default=5.0, show_default=True, callback=finite
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1_000_000, min_open=True),
    callback=finite,
    help="Requests due a second, whether or not answers come; at most --concurrency in flight (default then: 64).",
)
@click.option("--input", "-i", "source", help="Send rows of this file (as `predict` reads it). Default: random data.")
@click.option("--format", "-f", "kind", type=click.Choice(TENSOR_FORMATS), help="Format of the input.")
@click.option("--http", "url", help="Measure over HTTP, this or another node: http://host:port.")
@click.option(
    "--body", type=click.Choice(["json", "binary"]), help="With --http. Default: binary where the server takes it."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    version: int | None,
    concurrency: int | None,
    rows: int,
    seconds: float,
    rate: float | None,
    source: str | None,
    kind: str | None,
    url: str | None,
    body: str | None,
) -> None:
    """Measure how fast model NAME answers, over the worker protocol or with --http.

    Every caller sends its next request when it has its answer; with --rate requests are due at fixed times, and count
    from then. Each request is one of 16 of random data, or the next rows of --input. Ctrl-C ends it and prints what
    was measured so far.
    """
    from millhand.cli import EXIT_CODES
    from millhand.serving.bench import Plan

    output: Output = ctx.obj
    if body is not None and url is None:
        raise click.UsageError("--body is for --http: the worker protocol has a form of its own")
    plan = Plan(concurrency or (1 if rate is None else OPEN_LOOP_CONCURRENCY), rows, seconds, rate)
    data = Data(source, kind)
    if url is None:
        start, about = _over_worker(output, name, version, plan, data)
    else:
        start, about = _over_http(url, name, version, plan, data, body)
    if not output.as_json:
        for line in _heading(about, plan, data):
            click.echo(line)
    tally = asyncio.run(start())
    figures = tally.figures(rows)
    if not figures["requests"] and tally.last_error is not None:
        raise tally.last_error
    error = "" if tally.last_error is None else tally.last_error.message
    output.emit({**about, **asdict(plan), **figures, "last_error": error}, _lines(figures, plan, error))
    if tally.interrupted:
        ctx.exit(EXIT_CODES["interrupted"])


@dataclass(frozen=True)
class Data:
    """Where the rows come from: a file, or nowhere."""

    source: str | None
    kind: str | None

    def requests(self, inputs: Sequence[Mapping[str, Any]], rows: int) -> Sequence[Tensors]:
        """Requests of `rows` rows each. Raises InputError."""
        from millhand.cli.tensor_files import format_of, read_json, read_tensors, specs_of
        from millhand.serving.bench import random_requests, requests_from
        from millhand.serving.inference import read_request

        if self.source is None:
            return random_requests(inputs, rows)
        kind = format_of(self.source, self.kind)
        if kind == "json":
            return requests_from(read_request(read_json(self.source)).tensors, rows)
        return requests_from(read_tensors(self.source, kind, specs_of(inputs)), rows)


Start = Callable[[], Coroutine[Any, Any, "Tally"]]


def _over_worker(
    output: Output, name: str, version: int | None, plan: Plan, data: Data
) -> tuple[Start, dict[str, Any]]:
    """Through the worker protocol, as the pipeline and the fronts go. Raises where the plan does not fit the model."""
    from millhand.serving.bench import WorkerLine, follow_routes

    model = output.daemon().call("model.show", model=name)
    ready = model["versions"]
    if not ready or version not in (None, *ready):
        why = f"is {model['state']}" if not ready else f"does not serve version {version}"
        reason = f": {model['reason']}" if model["reason"] else ""
        raise ModelError(f"model '{name}' {why}{reason}", hint=f"millhand model versions {name}")
    if plan.rows > model["max_batch"]:
        raise InputError(
            f"--rows {plan.rows} is more than model '{name}' takes at once, {model['max_batch']}",
            hint=f"ask for fewer rows, or raise {model['max_batch_key']}",
        )
    requests = data.requests(model["inputs"], plan.rows)
    control_path = output.config().node.control_path

    async def start() -> Tally:
        routes, following = await follow_routes(control_path)
        try:
            return await _measure(plan, lambda: WorkerLine(routes, name, version, requests))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            routes.close()

    return start, {"model": name, "version": version or ready[-1], "via": "worker", "body": None, **_free(model)}


def _over_http(
    url: str, name: str, version: int | None, plan: Plan, data: Data, body: str | None
) -> tuple[Start, dict[str, Any]]:
    """Over HTTP, to any server of the Open Inference Protocol v2. Raises where none answers or it has no such model."""
    from millhand.serving.bench_http import BINARY, HttpLine, Server, encoded

    server = Server.parse(url)
    model = server.get(f"/v2/models/{quote(name, safe='')}" + (f"/versions/{version}" if version else ""))
    if body is None:
        body = "binary" if BINARY in server.get("/v2").get("extensions", ()) else "json"
    requests = data.requests(model["inputs"], plan.rows)
    bodies = [encoded(server, name, version, tensors, body == "binary") for tensors in requests]

    async def start() -> Tally:
        return await _measure(plan, lambda: HttpLine(server, bodies))

    return start, {"model": name, "version": version, "via": server.url, "body": body, **_free(model)}


async def _measure(plan: Plan, line: Callable[[], Line]) -> Tally:
    from millhand.serving.bench import Bench

    bench = Bench(plan, line)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, bench.stop)
    try:
        await bench.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return bench.tally


def _free(model: Mapping[str, Any]) -> dict[str, bool]:
    """Whether an input has free dimensions beside the batch: random data make them 1."""
    return {"free_dimensions": any(-1 in tensor["shape"][1:] for tensor in model["inputs"])}


# ---- what people read -----------------------------------------------------------------------------------------------


def _heading(about: Mapping[str, Any], plan: Plan, data: Data) -> list[str]:
    version = f" version {about['version']}" if about["version"] else ""
    way = "" if about["via"] == "worker" else f" at {about['via']}, {about['body']} bodies"
    pace = f"{plan.rate:g} requests a second, at most {plan.concurrency}" if plan.rate else f"{plan.concurrency}"
    what = "random data, free dimensions 1" if about["free_dimensions"] else "random data"
    if data.source is not None:
        what = "stdin" if data.source == "-" else data.source
    head = f"{about['model']}{version}{way}: {pace} at a time, {plural(plan.rows, 'row')} each, {what}, "
    return [*wrapped(f"{head}for {plan.seconds:g} s", rest="  "), ""]


def _lines(figures: Mapping[str, Any], plan: Plan, error: str) -> list[str]:
    if not figures["requests"]:
        return ["Nothing was measured."]
    latency = ", ".join(f"{name} {value:.3g} ms" for name, value in figures["latency_ms"].items())
    counts = f"{figures['requests']}, {figures['requests_per_s']:g} a second; {figures['rows_per_s']:g} rows a second"
    lines = [*labelled("Requests", counts), *labelled("Latency", latency)]
    if figures["queue_share"] is not None:
        queue, compute = figures["queue_share"], figures["compute_share"]
        rest = "the way" if plan.rate is None else "the way, and waiting for a free caller"
        lines += labelled(
            "Worker", f"queue {_percent(queue)}, compute {_percent(compute)} of the latency; the rest is {rest}"
        )
        lines += labelled("Batches", f"{figures['mean_batch_rows']:g} rows on average")
    late, unsent = figures["late"], figures["unsent"]
    if late or unsent:
        text = f"{late} requests waited for a caller to be free, {unsent} were never sent"
        lines += labelled("Late", f"{text}: raise --concurrency, or the rate is too much for the model")
    if figures["errors"]:
        counted = ", ".join(f"{count} {code}" for code, count in figures["errors"].items())
        lines += labelled("Errors", f"{counted}; the last: {error}")
    return [*lines, *([f"Interrupted after {figures['seconds']:g} s."] if figures["interrupted"] else [])]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
