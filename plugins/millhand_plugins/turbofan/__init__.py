"""Remaining useful life of turbofan engines: a feature extractor and one model for all four C-MAPSS subsets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from millhand.hookspecs import Evaluation, FeatureExtractor


@hookimpl
def millhand_extractors() -> Sequence[FeatureExtractor]:
    from millhand_plugins.turbofan.extractor import TurbofanExtractor

    return [TurbofanExtractor()]


@hookimpl
def millhand_evaluations() -> Sequence[Evaluation]:
    from millhand_plugins.turbofan.evaluation import TurbofanEvaluation

    return [TurbofanEvaluation()]


@hookimpl
def millhand_models() -> Sequence[Path]:
    return [Path(__file__).parent / "models"]
