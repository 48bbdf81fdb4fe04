"""Says of each candidate whether it may serve, and of all of them which one does. Reasons are sentences."""

from __future__ import annotations

from collections.abc import Mapping

from millhand.proof.document import Latency, Proof, Score
from millhand.workshop.settings import WorkshopSettings


def verdict(score: Score) -> tuple[bool, tuple[str, ...]]:
    """Whether a candidate that was run keeps the metric well enough, and why."""
    change = _change(score)
    values = f"{score.original:.4g} to {score.candidate:.4g} on {score.rows} rows"
    reasons = [f"{change[0].upper()}{change[1:]}: {values}; {score.limit_percent:g} % are allowed."]
    passed = score.drop_percent <= score.limit_percent
    if score.metric not in ("rmse", "perplexity") and 0 < score.limit_percent < 100 / score.rows:
        reasons.append(f"One row of {score.rows} counts {100 / score.rows:.2g} %: more rows would say more.")
    return passed, tuple(reasons)


def choose(proofs: Mapping[str, Proof], original_bytes: int, batch: int, settings: WorkshopSettings) -> tuple[str, str]:
    """The candidate that shall serve, or "" for the original, and why in a sentence.

    proofs: by candidate, of those that were run. batch: the one that traffic brings most often. Speeds are compared by
    each candidate's own pair of measurements, so that a load of the machine meanwhile does not decide.
    """
    passed = {name: proof for name, proof in proofs.items() if _passed(proof, settings.drop_percent_cap)}
    if not passed:
        told = "none was run" if not any(proof.executed for proof in proofs.values()) else "no candidate passed"
        return "", f"The original serves: {told}."
    margin = settings.margin_percent / 100
    shares = {name: _share(proof, batch) for name, proof in passed.items()}
    best = min(passed, key=lambda name: (shares[name], passed[name].bytes))
    if shares[best] <= 1 - margin:
        return best, (
            f"{best} serves: of those that passed it is the fastest, {_times(1 / shares[best])} as fast as the "
            f"original at batches of {batch}, {_change(passed[best].score)}."
        )
    steady = {name: proof for name, proof in passed.items() if shares[name] < 1 + margin}
    small = min(steady, key=lambda name: (steady[name].bytes, shares[name]), default="")
    if small and steady[small].bytes <= original_bytes * (1 - margin):
        size = steady[small].bytes / original_bytes
        return small, (
            f"{small} serves: none is faster than the original by {settings.margin_percent:g} %, and it is the "
            f"smallest that is not slower, {size:.0%} of the original's size, {_change(passed[small].score)}."
        )
    return "", (
        f"The original serves: {len(passed)} passed, and none is faster by {settings.margin_percent:g} %, or smaller "
        f"without being slower; the fastest, {best}, takes {shares[best]:.0%} of the original's time."
    )


def _passed(proof: Proof, cap_percent: float) -> bool:
    """Whether a proof says so, and would by today's cap."""
    return proof.executed and proof.passed and proof.score is not None and proof.score.drop_percent <= cap_percent


def timed(proof: Proof, batch: int) -> Latency | None:
    """What was measured at a batch size; None where it was not."""
    return next((latency for latency in proof.latency if latency.batch == batch), None)


def _share(proof: Proof, batch: int) -> float:
    """The candidate's median time as a share of the original's."""
    latency = timed(proof, batch)
    return latency.p50_ms / latency.original_p50_ms if latency else float("inf")


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor >= 1.1 else f"{factor:.2f} times"


def _change(score: Score | None) -> str:
    assert score is not None
    metric = "the RMSE" if score.metric == "rmse" else f"the {score.metric}"
    if score.drop_percent > 0:
        return f"{metric} is worse by {score.drop_percent:.2g} %"
    return f"{metric} is better by {-score.drop_percent:.2g} %" if score.drop_percent else f"{metric} is kept"
