"""`millhand model compare`: what was made of a model, what each candidate is worth, which one serves and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import LINE_CHARACTERS, Output, json_option, table, wrapped

if TYPE_CHECKING:
    from millhand.proof.document import Proof
    from millhand.workshop.report import BuildReport, Outcome
    from millhand.workshop.shelf import Shelf

KIB, MIB = 1 << 10, 1 << 20
NOTHING = "-"
TOLD = ("refused", "failed", "not tried")
HEADERS = ("candidate", "type", "size", "metric", "drop", "speed", "p50", "p99", "mem", "verdict")
NAME_CHARACTERS = 13


@click.command("compare", short_help="Show what was made of a model, which candidate won, and why.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--target", help="Of which hardware. Default: where the model serves on this node.")
@click.option("--version", type=click.IntRange(1), help="Default: the newest that the model's policy serves.")
@click.option("--data", type=click.Path(path_type=Path), help="Several language models: the text to rank them on.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, names: tuple[str, ...], target: str | None, version: int | None, data: Path | None
) -> None:
    """Show the candidates of model NAME: size, metric, latency and memory beside the original's, and the verdict.

    Several names are language models, which are measured now and ranked on one text.
    """
    from millhand.cli import language_build
    from millhand.language.library import open_library
    from millhand.workshop.boards import target_named
    from millhand.workshop.report import read_report
    from millhand.workshop.site import open_site

    output: Output = ctx.obj
    site, library, name = open_site(output.config()), open_library(output.config()), names[0]
    if names[1:]:
        language_build.compare_models(output, site, library, names, data)
        return
    if name in library.names():
        language_build.compare_precisions(output, site, library.model(name))
        return
    folder = site.repository.find(name)
    wanted = target_named(target, site.targets, site.profiles) if target else site.own_target(folder)
    place = site.shelf.place(name, version or folder.chosen()[-1], wanted.name)
    show(output, site.shelf, read_report(place, name))


def show(output: Output, shelf: Shelf, report: BuildReport) -> None:
    """Print a build's outcome."""
    from millhand.workshop.proving import read_if_there

    found = shelf.candidates(report.model, report.version, report.target)
    proofs = {candidate.name: read_if_there(candidate.folder) for candidate in found}
    known = {name: proof for name, proof in proofs.items() if proof and proof.source_sha256 == report.source_sha256}
    own = _own(shelf, report)
    output.emit(_data(report, known, own), _lines(report, known, own))


def _own(shelf: Shelf, report: BuildReport) -> Proof | None:
    """The proof of the model's own artifact for this target."""
    from millhand.workshop.proving import read_if_there

    proof = read_if_there(shelf.original(report.model, report.version))
    fits = proof and (proof.sha256, proof.target) == (report.source_sha256, report.target)
    return proof if fits else None


def _data(report: BuildReport, proofs: dict[str, Proof], own: Proof | None) -> dict[str, Any]:
    import msgspec

    return {
        **msgspec.to_builtins(report),
        "own_proof": own and msgspec.to_builtins(own),
        "candidates": {name: msgspec.to_builtins(proof) for name, proof in proofs.items()},
    }


def _lines(report: BuildReport, proofs: dict[str, Proof], own: Proof | None) -> list[str]:
    states = {outcome.name: outcome for outcome in report.outcomes}
    rows = [_original(report, proofs, own)]
    rows += [_row(report, proof, states[name].state if name in states else "") for name, proof in proofs.items()]
    rows += [_bare_row(outcome) for name, outcome in states.items() if name not in proofs and outcome.precision]
    lines = wrapped(f"{report.model} version {report.version} for {report.target}, {_measured(report, proofs)}")
    lines += ["", *table(HEADERS, rows, LINE_CHARACTERS)]
    told = _told(report)
    lines += ["", *told] if told else []
    why = report.why or (
        f"Built for {report.target}, which is not in this machine: nothing was run, and nothing was chosen. On a node "
        f"with that chip 'millhand model build {report.model}' proves what lies on its shelf."
    )
    lines += ["", *wrapped(why)]
    for number, way in enumerate(report.ways):
        lines += ["", *wrapped(way)] if number == 0 else wrapped(way, "  ", "    ")
    return lines


def _told(report: BuildReport) -> list[str]:
    """Why candidates do not serve, those of one reason together."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for outcome in (*((report.original,) if report.original else ()), *report.outcomes):
        if outcome.state in TOLD:
            names.setdefault((outcome.state, outcome.why, outcome.hint), []).append(outcome.name)
    lines = []
    for (state, why, hint), which in names.items():
        lines += wrapped(f"{', '.join(which)} {state}: {why}", rest="  ")
        lines += wrapped(f"Try: {hint}", "  ", "  ") if hint else []
    return lines


def _measured(report: BuildReport, proofs: dict[str, Proof]) -> str:
    """What the columns mean."""
    score = next((proof.score for proof in proofs.values() if proof.score), None)
    if score is None:
        return "not run"
    data = score.data.partition("; sha256")[0]
    if score.metric == "perplexity":
        return (
            f"{score.metric} on {score.rows} tokens ({data}); speed beside the original, p50 and p99 in ms for a token "
            "that is written"
        )
    return (
        f"{score.metric} on {score.rows} rows ({data}); speed beside the original, p50 and p99 in ms, at batches of "
        f"{report.typical_batch}, one thread"
    )


def _original(report: BuildReport, proofs: dict[str, Proof], own: Proof | None) -> tuple[str, ...]:
    """The model's own artifact, as it did beside the candidate that was chosen, or beside the first, or alone."""
    from millhand.workshop.gate import timed

    beside = proofs.get(report.chosen) or next((proof for proof in proofs.values() if proof.score), own)
    score = beside.score if beside else None
    latency = timed(beside, report.typical_batch) if beside else None
    return (
        "(original)",
        "",
        _size(report.source_bytes),
        f"{score.original:.4g}" if score else NOTHING,
        NOTHING,
        "",
        _ms(latency.original_p50_ms) if latency else NOTHING,
        _ms(latency.original_p99_ms) if latency else NOTHING,
        _size(beside.original_memory_bytes if beside else None),
        _original_verdict(report, own),
    )


def _original_verdict(report: BuildReport, own: Proof | None) -> str:
    if report.original is not None and report.original.state == "failed":
        return "failed"
    if report.executed and not report.chosen:
        return "serves"
    return "proved" if own else ""


def _row(report: BuildReport, proof: Proof, state: str) -> tuple[str, ...]:
    from millhand.workshop.gate import timed

    score, latency = proof.score, timed(proof, report.typical_batch)
    verdict = ("passed" if proof.passed else "refused") if proof.executed else "built"
    if state == "failed":
        verdict = "failed"
    return (
        _short(proof.candidate),
        proof.precision,
        _size(proof.bytes),
        f"{score.candidate:.4g}" if score else NOTHING,
        f"{round(score.drop_percent, 2) + 0.0:.2f}%" if score else NOTHING,
        f"{latency.original_p50_ms / latency.p50_ms:.2f}x" if latency else NOTHING,
        _ms(latency.p50_ms) if latency else NOTHING,
        _ms(latency.p99_ms) if latency else NOTHING,
        _size(proof.memory_bytes),
        "serves" if proof.candidate == report.chosen else verdict,
    )


def _bare_row(outcome: Outcome) -> tuple[str, ...]:
    """A candidate without a proof."""
    verdict = outcome.state if outcome.state == "failed" else NOTHING
    return (_short(outcome.name), outcome.precision, *[NOTHING] * 7, verdict)


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"


def _ms(time_ms: float) -> str:
    """Five characters up to ten seconds."""
    return f"{time_ms:.{max(0, 4 - len(str(int(time_ms))))}f}"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return NOTHING
    if size_bytes < KIB:
        return f"{size_bytes}B"
    return f"{size_bytes / KIB:.3g}K" if size_bytes < 1000 * KIB else f"{size_bytes / MIB:.3g}M"
