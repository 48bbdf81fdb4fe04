"""proof.html: what a proof says, for the technician who has to decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from millhand.pages import render
from millhand.pages.bars import Bar, Bars
from millhand.proof.document import Latency, Layer, Proof, Score

LAYERS_SHOWN = 24
HIGH_ERROR = 0.01
"""A layer that loses more of its output's power is drawn as bad: 20 dB of signal to error."""
KIB = 1024


def page(proof: Proof) -> str:
    """The page, HTML. It shows what the proof says; whether that may be believed is for `millhand model verify`."""
    return render(
        "millhand.proof",
        "proof.html.j2",
        proof=proof,
        headline=headline(proof),
        alone=proof.alone,
        passed=proof.passed and proof.executed,
        summary=_summary(proof),
        facts=_facts(proof),
        score=_score(proof),
        latency=[(_batch(found), _latency_bars(found, proof.alone)) for found in proof.latency],
        sizes=_sizes(proof),
        layers=_layers(proof.layers),
        layers_shown=_layers_shown(proof.layers),
        node=list(flat(proof.node)),
        identity=_identity(proof),
    )


def headline(proof: Proof) -> str:
    """The verdict in one line."""
    what = f"{proof.candidate or 'the original'} of {proof.model}, version {proof.version}"
    if not proof.executed:
        return f"Never run: {what}"
    passed = "Measured" if proof.alone else "Passed"
    return f"{passed if proof.passed else 'Failed'}: {what}"


def score_text(score: Score, value: float) -> str:
    """A value of the metric; an accuracy in percent."""
    return f"{100 * value:.2f} %" if score.metric in ("accuracy", "agreement") else f"{value:.4g}"


def size_text(size_bytes: float) -> str:
    if size_bytes < KIB**2:
        return f"{size_bytes / KIB:.1f} KiB"
    return f"{size_bytes / KIB**2:.1f} MiB"


def time_text(time_ms: float) -> str:
    if time_ms < 0.0995:
        return f"{time_ms * 1e3:.3g} µs"
    return f"{time_ms:.3g} ms" if time_ms < 999.5 else f"{time_ms / 1e3:.3g} s"


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value, in the table's order."""
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(map(str, value))
        else:
            yield name, "not known" if value is None else str(value)


def faster(latency: Latency) -> float | None:
    """How many times quicker than the original, by the medians; None where there is nothing to divide by."""
    return latency.original_p50_ms / latency.p50_ms if latency.p50_ms > 0 else None


def _summary(proof: Proof) -> str:
    where = proof.node.get("name")
    place = f" on {where}" if isinstance(where, str) and where else ""
    if not proof.executed:
        return f"Made{place} on {proof.date} for {proof.target}, which is not in that machine: nothing was measured."
    how = "as it is" if proof.alone else "beside the original and on data it had not seen"
    return f"Measured{place} on {proof.date} for {proof.target}, {how}."


def _facts(proof: Proof) -> list[dict[str, str]]:
    cells: list[tuple[str, str, bool | None]] = []
    if proof.score is not None and proof.alone:
        cells.append((proof.score.metric, score_text(proof.score, proof.score.candidate), None))
    elif proof.score is not None:
        worse = proof.score.drop_percent
        label = f"{proof.score.metric}: {'worse' if worse > 0 else 'better'} than the original (limit {_limit(proof)})"
        cells.append((label, f"{abs(worse):.2f} %", worse <= proof.score.limit_percent))
    for found in proof.latency[:2]:
        if proof.alone:
            cells.append((f"{_batch(found).lower()} (p50)", time_text(found.p50_ms), None))
        elif times := faster(found):
            word, factor = ("faster", times) if times >= 1 else ("slower", 1 / times)
            cells.append((f"{word}, {_batch(found).lower()} (p50)", f"{factor:.2f} ×", times >= 1))
    if proof.alone:
        cells.append(("size", size_text(proof.bytes), None))
    elif proof.source_bytes:
        share = 100 * proof.bytes / proof.source_bytes
        cells.append(("of the original's size", f"{share:.0f} %", None))
    if proof.memory_bytes is not None:
        cells.append(("memory", size_text(proof.memory_bytes), None))
    if proof.energy_mj is not None:
        cells.append(("energy of one inference", f"{proof.energy_mj:.3g} mJ", None))
    styles = {True: "good", False: "bad", None: ""}
    return [{"label": label, "value": value, "style": styles[good]} for label, value, good in cells]


def _limit(proof: Proof) -> str:
    return f"{proof.score.limit_percent:g} %" if proof.score else ""


def _score(proof: Proof) -> list[tuple[str, str]]:
    score = proof.score
    if score is None:
        return []
    beside = [
        ("Candidate", score_text(score, score.candidate)),
        ("Drop, limit", f"{score.drop_percent:.2f} %, {score.limit_percent:g} %"),
    ]
    return [
        ("Metric", f"{score.metric}, {'higher' if score.higher_is_better else 'lower'} is better"),
        ("Original", score_text(score, score.original)),
        *(() if proof.alone else beside),
        ("Rows", f"{score.rows:,}"),
        ("Data", score.data),
    ]


def _batch(latency: Latency) -> str:
    return "One row" if latency.batch == 1 else f"A batch of {latency.batch}"


def _latency_bars(found: Latency, alone: bool) -> Bars:
    pairs = [("Original", found.original_p50_ms, found.original_p99_ms, "before")]
    if not alone:
        pairs.append(("Candidate", found.p50_ms, found.p99_ms, "after"))
    rows = [
        Bar(name, p50_ms, f"{time_text(p50_ms)}, p99 {time_text(p99_ms)}", style, p99_ms)
        for name, p50_ms, p99_ms, style in pairs
    ]
    return Bars(f"Latency, {_batch(found).lower()}", rows)


def _sizes(proof: Proof) -> list[tuple[str, Bars]]:
    pairs = [
        ("On disk", proof.source_bytes, proof.bytes),
        ("In memory", proof.original_memory_bytes, proof.memory_bytes),
    ]
    charts = []
    for title, before, after in pairs:
        if before is not None and after is not None and not proof.alone:
            rows = [
                Bar("Original", before, size_text(before), "before"),
                Bar("Candidate", after, size_text(after), "after"),
            ]
            charts.append((title, Bars(title, rows)))
    return charts


def _layers(layers: Sequence[Layer]) -> Bars | None:
    measured = sorted(_measured(layers), key=lambda found: -found[1])[:LAYERS_SHOWN]
    rows = [
        Bar(layer.name, error, f"{layer.operator}, {layer.precision}, {100 * error:.2g} %",
            "bad" if error > HIGH_ERROR else "after")
        for layer, error in measured
    ]  # fmt: skip
    return Bars("Error of each layer", rows, log=True) if rows else None


def _layers_shown(layers: Sequence[Layer]) -> str:
    measured = len(_measured(layers))
    shown = (
        f"the worst {LAYERS_SHOWN} of {measured}" if measured > LAYERS_SHOWN else f"all {measured} that were measured"
    )
    return f"{shown}; {len(layers) - measured} were not measured" if measured < len(layers) else shown


def _measured(layers: Sequence[Layer]) -> list[tuple[Layer, float]]:
    return [(layer, layer.error) for layer in layers if layer.error is not None]


def _identity(proof: Proof) -> list[tuple[str, str]]:
    rows = [
        ("Model", f"{proof.model}, version {proof.version}"),
        ("Candidate", proof.candidate or "none: the model's own artifact"),
        ("Target", proof.target),
        ("Precision", proof.precision),
        ("Backend", proof.backend),
        ("Artifact", proof.artifact),
        ("SHA-256", proof.sha256),
        ("Made from", proof.source_sha256),
        *((f"Option {name}", text) for name, text in flat(proof.options)),
        *((f"Tied to {name}", text) for name, text in flat(proof.key)),
    ]
    return [(name, text) for name, text in rows if text]
