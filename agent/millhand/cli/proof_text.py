"""A proof on one screen of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from millhand.cli.output import LABEL_CHARACTERS, LINE_CHARACTERS, labelled, plural, shorten, table, wrapped
from millhand.proof.document import PROOF, Proof
from millhand.proof.page import faster, flat, headline, score_text, size_text, time_text
from millhand.proof.verification import Verdict

LAYERS_SHOWN = 3
NOTES_SHOWN = 2
LAYER_CHARACTERS = 40
TEXT_CHARACTERS = LINE_CHARACTERS - LABEL_CHARACTERS
Row = tuple[str, str, str, str]


def describe(proof: Proof, verdict: Verdict, folder: Path) -> list[str]:
    """Whether it may be believed, the gate's verdict, what was measured, and where it comes from."""
    worth = verdict.reason or f"signed by a key that this node trusts, {', '.join(verdict.signers)}"
    lines = wrapped(f"{verdict.state.capitalize()}: {worth}")
    reasons = () if verdict.failed_gate else proof.reasons  # else they stand above
    for text in (f"{headline(proof)}, for {proof.target}", *reasons):
        lines += wrapped(text)
    rows = list(_measured(proof))
    if rows and proof.alone:
        lines += ["", *table(("measure", "original"), [row[:2] for row in rows], LINE_CHARACTERS)]
    elif rows:
        lines += ["", *table(("measure", "original", "candidate", ""), rows, LINE_CHARACTERS)]
    signers = ", ".join(f"{signature.role} {signature.key}" for signature in proof.signatures) or "nobody"
    return [*lines, "", *_facts(proof), *labelled("signed by", signers), *labelled("proof", str(folder / PROOF))]


def _measured(proof: Proof) -> Iterator[Row]:
    if (score := proof.score) is not None:
        way = "worse" if score.drop_percent > 0 else "better"
        change = f"{abs(score.drop_percent):.2f} % {way}, cap {score.limit_percent:g} %"
        yield score.metric, score_text(score, score.original), score_text(score, score.candidate), change
    for found in proof.latency:
        times = faster(found)
        change = f"{times:.2f} times as quick" if times is not None else ""
        before = f"{time_text(found.original_p50_ms)}, p99 {time_text(found.original_p99_ms)}"
        after = f"{time_text(found.p50_ms)}, p99 {time_text(found.p99_ms)}"
        yield f"batch {found.batch}", before, after, change
    if proof.source_bytes:
        share = f"{100 * proof.bytes / proof.source_bytes:.0f} %"
        yield "size", size_text(proof.source_bytes), size_text(proof.bytes), share
    if proof.memory_bytes is not None:
        before = "-" if proof.original_memory_bytes is None else size_text(proof.original_memory_bytes)
        yield "memory", before, size_text(proof.memory_bytes), ""
    if proof.energy_mj is not None:
        energy = f"{proof.energy_mj:.3g} mJ"
        yield "energy", energy if proof.alone else "-", energy, "one inference"


def _facts(proof: Proof) -> list[str]:
    measured = [(layer, layer.error) for layer in proof.layers if layer.error is not None]
    worst = sorted(measured, key=lambda found: -found[1])[:LAYERS_SHOWN]
    layers = [
        f"{shorten_path(layer.name)} ({layer.precision}) loses {100 * error:.2g} %" for layer, error in worst
    ]  # fmt: skip
    notes = [shorten(note, TEXT_CHARACTERS) for note in proof.notes[:NOTES_SHOWN]]
    if proof.notes[NOTES_SHOWN:]:
        notes.append(f"{plural(len(proof.notes) - NOTES_SHOWN, 'more note')} in --html and --json")
    place = dict(flat(proof.node))
    node = ", ".join(dict.fromkeys([place.pop("name", ""), *(text for text in place.values() if text != "not known")]))
    data = f"{proof.score.rows:,} rows: {proof.score.data}" if proof.score is not None else ""
    lines = labelled("worst", layers[0]) if layers else []
    for layer in layers[1:]:
        lines += labelled("", layer)
    for note in notes:
        lines += labelled("note", note)
    for label, text in (("data", data), ("node", node), ("date", proof.date)):
        lines += labelled(label, shorten(text, TEXT_CHARACTERS))
    return lines


def shorten_path(name: str) -> str:
    """A layer's name that fits; of a long path the end says most."""
    return name if len(name) <= LAYER_CHARACTERS else f"…{name[1 - LAYER_CHARACTERS :]}"
