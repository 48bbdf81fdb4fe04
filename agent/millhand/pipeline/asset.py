"""One asset's way from batch to commit: windows, features, predictions, alerts, work orders, one transaction."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import MillhandError, ModelError, StoreError
from millhand.pipeline.judgement import judge
from millhand.pipeline.rules import RuleEngine, RuleState
from millhand.pipeline.windows import Snapshot, Window, WindowBuilder
from millhand.records import Alert, AlertState, Batch, Prediction, WorkOrder
from millhand.serving.manifest import Manifest
from millhand.store.rows import Step

if TYPE_CHECKING:
    from millhand.hookspecs import FeatureExtractor, Features, OrderWriter
    from millhand.pipeline.settings import AssetSettings

log = logging.getLogger("millhand.pipeline")

# A live machine goes on while we wait; a recording does not, so its predictions are worth waiting for.
LIVE_PATIENCE_S = 2.0
REPLAY_PATIENCE_S = 120.0
RETRY_FIRST_S, RETRY_LAST_S = 0.05, 1.0
LATENCIES_KEPT = 4096


class Infer(Protocol):
    """How a pipeline asks a model: `ModelPool.infer`."""

    def __call__(
        self, model: str, tensors: Mapping[str, NDArray[Any]]
    ) -> Awaitable[tuple[dict[str, NDArray[Any]], int]]: ...


class Committer(Protocol):
    """What a pipeline needs of the store."""

    async def commit(self, step: Step) -> None: ...

    async def resume(self, asset: str) -> tuple[bytes | None, bytes | None]: ...

    async def alerts(self, state: str | None = None, asset: str | None = None, limit: int = 100) -> list[Alert]: ...


class ModelState(msgspec.Struct):
    """One model's windows and rules between two steps."""

    windows: Snapshot
    rules: dict[str, RuleState]


class Counters(msgspec.Struct):
    """What the asset did since the agent's start."""

    batches: int = 0
    readings: int = 0
    predictions: int = 0
    predictions_failed: int = 0
    windows_skipped: int = 0
    """Windows that an extractor could not judge: the machine stands still, a snapshot is unusable."""
    extractor_errors: int = 0
    alerts: int = 0


@dataclass(slots=True)
class _Judge:
    """What judges the asset for one model."""

    manifest: Manifest
    extractor: FeatureExtractor
    windows: WindowBuilder
    rules: RuleEngine


class AssetPipeline:
    """Turns batches into committed steps. One at a time; a step commits whole or not at all."""

    def __init__(
        self,
        settings: AssetSettings,
        *,
        models: Sequence[tuple[Manifest, FeatureExtractor]],
        infer: Infer,
        store: Committer,
        writer: OrderWriter,
        history: int = 20,
    ) -> None:
        """Raises ConfigError where rules and models do not fit together."""
        self.asset = settings.name
        self.settings = settings
        self.counters = Counters()
        self.last_error: MillhandError | None = None
        self.latencies_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)
        """Arrival of a window's closing reading to its committed prediction, newest last."""
        self._infer = infer
        self._store = store
        self._writer = writer
        self._history = history
        self._judges = {
            manifest.name: _Judge(
                manifest,
                extractor,
                WindowBuilder(
                    settings.name,
                    _window_spec(manifest),
                    {**manifest.features.options, **settings.context},
                    settings.limits,
                ),
                RuleEngine(settings.name, manifest, settings.rules),
            )
            for manifest, extractor in models
        }

    async def restore(self) -> bytes | None:
        """Load the committed windows and rules; return the adapter's cursor."""
        cursor, state = await self._store.resume(self.asset)
        if state:
            try:
                kept = msgspec.msgpack.decode(state, type=dict[str, ModelState])
            except msgspec.MsgspecError as error:
                log.error("asset %s: the kept windows cannot be read (%s); they begin anew", self.asset, error)
                kept = {}
            for name, model_state in kept.items():
                if name in self._judges:
                    self._judges[name].windows.load(model_state.windows)
                    self._judges[name].rules.load(model_state.rules)
        return cursor

    async def step(self, batch: Batch) -> None:
        """Take a batch through all stages and commit it. Raises StoreError where waiting cannot help.

        A model that cannot answer never costs a reading: its windows are asked again for a while, then counted as
        failed, and the step commits without them. A full disk does not cost one either: the same step is offered to
        the store until it fits.
        """
        arrived = time.monotonic()
        patience_s = LIVE_PATIENCE_S if batch.cursor is None else REPLAY_PATIENCE_S
        predictions: list[Prediction] = []
        alerts: list[Alert] = []
        for judge_ in self._judges.values():
            windows = judge_.windows.add(batch)
            made = await self._predict(judge_, windows, patience_s, arrived) if windows else []
            predictions += made
            for prediction in made:
                alerts += judge_.rules.judge(prediction)
        orders = [await self._order(alert) for alert in alerts if alert.state is AlertState.OPEN]
        step = Step(self.asset, batch, self._dump(), tuple(predictions), tuple(alerts), tuple(orders))
        await self._commit(step)
        self._count(batch, predictions, alerts, arrived)

    async def _commit(self, step: Step) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self._store.commit(step)
                return
            except StoreError as error:
                self.last_error = error
                if not error.retriable:
                    raise
                log.error("asset %s: the store took nothing: %s", self.asset, error.message)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_LAST_S)

    def _count(self, batch: Batch, predictions: list[Prediction], alerts: list[Alert], arrived: float) -> None:
        self.counters.batches += 1
        self.counters.readings += len(batch.readings)
        self.counters.predictions += len(predictions)
        self.counters.alerts += sum(alert.state is AlertState.OPEN for alert in alerts)
        self.latencies_ms.extend([(time.monotonic() - arrived) * 1000] * len(predictions))

    def _dump(self) -> bytes:
        states = {name: ModelState(j.windows.dump(), j.rules.dump()) for name, j in self._judges.items()}
        return msgspec.msgpack.encode(states)

    # ---- windows into predictions -----------------------------------------------------------------------------------

    async def _predict(
        self, judge_: _Judge, windows: Sequence[Window], patience_s: float, arrived: float
    ) -> list[Prediction]:
        features = [(window, self._extract(judge_, window)) for window in windows]
        ready = [(window, found) for window, found in features if found is not None]
        predictions: list[Prediction] = []
        size = judge_.manifest.max_batch
        for first in range(0, len(ready), size):
            part = ready[first : first + size]
            answer = await self._ask(judge_.manifest, [found for _, found in part], patience_s)
            if answer is None:
                self.counters.predictions_failed += len(part)
                continue
            answers, version = answer
            for (window, found), (values, kind, confidence) in zip(part, answers, strict=True):
                predictions.append(
                    Prediction(
                        asset=self.asset,
                        model=judge_.manifest.name,
                        version=version,
                        window_start_ns=window.start_ns,
                        window_end_ns=window.end_ns,
                        values=values,
                        kind=kind,
                        confidence=confidence,
                        state=window.state,
                        evidence=dict(found.evidence),
                        latency_ms=(time.monotonic() - arrived) * 1000,
                    )
                )
        return predictions

    def _extract(self, judge_: _Judge, window: Window) -> Features | None:
        try:
            found = judge_.extractor.extract(window)
        except Exception as error:
            self.counters.extractor_errors += 1
            log.exception("asset %s: extractor %s failed", self.asset, judge_.extractor.name)
            self.last_error = ModelError(
                f"extractor '{judge_.extractor.name}' failed: {type(error).__name__}: {error}",
                hint="report this to the plugin's author",
            )
            return None
        if found is None:
            self.counters.windows_skipped += 1
        return found

    async def _ask(
        self, manifest: Manifest, features: Sequence[Features], patience_s: float
    ) -> tuple[Sequence[tuple[dict[str, float], str, float]], int] | None:
        """Ask the model for all windows at once, again while the error is retriable and patience lasts."""
        names = features[0].tensors.keys()
        tensors = {name: np.stack([found.tensors[name] for found in features]) for name in names}
        deadline = time.monotonic() + patience_s
        delay_s = RETRY_FIRST_S
        while True:
            try:
                outputs, version = await self._infer(manifest.name, tensors)
                return judge(manifest, outputs, len(features)), version
            except MillhandError as error:
                self.last_error = error
                if not error.retriable or time.monotonic() + delay_s > deadline:
                    log.error("asset %s: model %s gave no answer: %s", self.asset, manifest.name, error.message)
                    return None
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_LAST_S)

    async def _order(self, alert: Alert) -> WorkOrder:
        history = await self._store.alerts(asset=self.asset, limit=self._history) if self._history else []
        return self._writer.write(alert, [earlier for earlier in history if earlier.id != alert.id])

    def window_counters(self) -> dict[str, dict[str, int]]:
        """What each model's windows left out."""
        return {name: msgspec.to_builtins(judge_.windows.counters) for name, judge_ in self._judges.items()}


def _window_spec(manifest: Manifest) -> Any:
    if manifest.window is None:
        raise ModelError(f"model '{manifest.name}' has no [window]", hint="add it to model.toml")
    return manifest.window
