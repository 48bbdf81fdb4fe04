"""A simulated motor-bearing-pump skid, in-process or over Modbus, and two models that know its faults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millhand.hookspecs import AdapterKind, Evaluation, FeatureExtractor, hookimpl
from millhand_plugins.rig.adapter import RigKind
from millhand_plugins.rig.evaluation import RigEvaluation
from millhand_plugins.rig.extractor import RigExtractor
from millhand_plugins.rig.waveform import WaveformExtractor


@hookimpl
def millhand_adapters(config: Any) -> Sequence[AdapterKind]:
    return [RigKind()]


@hookimpl
def millhand_extractors(config: Any) -> Sequence[FeatureExtractor]:
    return [RigExtractor(), WaveformExtractor()]


@hookimpl
def millhand_evaluations(config: Any) -> Sequence[Evaluation]:
    return [RigEvaluation("rig-fault", RigExtractor()), RigEvaluation("rig-wave", WaveformExtractor())]


@hookimpl
def millhand_models(config: Any) -> Sequence[Path]:
    return [Path(__file__).parent / "models"]
