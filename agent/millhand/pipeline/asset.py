"""One asset's way from batch to commit: windows, features, predictions, alerts, work orders, one transaction."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand import metrics
from millhand.errors import ConfigError, DeadlineError, MillhandError, ModelError, PluginError, StoreError, suggestion
from millhand.pipeline.features import FeatureSet
from millhand.pipeline.judgement import Answer, judge
from millhand.pipeline.rules import RuleEngine, RuleState
from millhand.pipeline.windows import Snapshot, Window, WindowBuilder
from millhand.records import Alert, AlertState, Batch, Prediction, WorkOrder
from millhand.serving.manifest import Manifest
from millhand.store.rows import Step

if TYPE_CHECKING:
    from millhand.hookspecs import FeatureExtractor, OrderWriter
    from millhand.pipeline.settings import AssetSettings

log = logging.getLogger("millhand.pipeline")

# A live machine goes on while we wait; a recording does not, so its predictions are worth waiting for.
LIVE_PATIENCE_S = 2.0
REPLAY_PATIENCE_S = 120.0
# A model that let a live machine wait in vain is only knocked at until it answers again: polls must not fall behind.
KNOCK_S = 0.1
RETRY_FIRST_S, RETRY_LAST_S = 0.05, 1.0
LATENCIES_KEPT = 4096


class Infer(Protocol):
    """How a pipeline asks a model: `ModelPool.infer`."""

    def __call__(
        self, model: str, tensors: Mapping[str, NDArray[Any]]
    ) -> Awaitable[tuple[dict[str, NDArray[Any]], int]]: ...


class Record(Protocol):
    """Where the rows go that a model has answered: `Recorder.offer`."""

    def __call__(self, model: str, tensors: Mapping[str, NDArray[Any]], window_end_ns: int, asset: str) -> object: ...


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
    orders_failed: int = 0
    """Alerts whose order writer failed; the alert itself is kept."""


class Latency(NamedTuple):
    """How long one prediction took."""

    window_end_ns: int
    committed_ns: int
    """Monotonic time of its commit."""
    latency_ms: float
    """From the arrival of the window's closing reading to the commit."""


Judgeable = tuple[Window, FeatureSet]


@dataclass(slots=True)
class _Judge:
    """What judges the asset for one model."""

    manifest: Manifest
    extractor: FeatureExtractor
    windows: WindowBuilder
    rules: RuleEngine
    silent: bool = False
    """Its model left the last question unanswered."""


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
        record: Record | None = None,
    ) -> None:
        """Raises ConfigError where rules and models do not fit together, ModelError for a model without a window."""
        self.asset = settings.name
        self.settings = settings
        self.counters = Counters()
        self.latencies: deque[Latency] = deque(maxlen=LATENCIES_KEPT)
        """Of the last predictions, newest last."""
        self._infer = infer
        self._store = store
        self._writer = writer
        self._history = history
        self._record = record
        self._models = list(models)
        self._errors: dict[str, MillhandError] = {}
        """Part -> what ails it now."""
        self._check_overrides()
        self._judges = self._new_judges()

    @property
    def last_error(self) -> MillhandError | None:
        """What ails the asset now, None where all is well."""
        return next(reversed(self._errors.values()), None)

    def _check_overrides(self) -> None:
        """A rule that no model has is a slip of the pen, unless its model is missing."""
        known = {rule.name for manifest, _ in self._models for rule in manifest.rules}
        complete = {manifest.name for manifest, _ in self._models} == set(self.settings.models)
        for name in self.settings.rules.keys() - known if complete else ():
            raise ConfigError(
                f"asset '{self.asset}': rules.{name} changes a rule that its models do not have"
                f"{suggestion(name, known)}",
                hint=f"its models' rules are {', '.join(sorted(known)) or 'none'}",
            )

    def _new_judges(self) -> dict[str, _Judge]:
        settings = self.settings
        return {
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
            for manifest, extractor in self._models
        }

    async def restore(self) -> bytes | None:
        """Go back to the committed windows and rules; return the adapter's cursor. Raises StoreError."""
        cursor, state = await self._store.resume(self.asset)
        self._judges = self._new_judges()
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
        live = batch.cursor is None
        predictions: list[Prediction] = []
        alerts: list[Alert] = []
        for judge_ in self._judges.values():
            windows = judge_.windows.add(batch)
            made = await self._predict(judge_, windows, live, arrived) if windows else []
            predictions += made
            for prediction in made:
                alerts += judge_.rules.judge(prediction)
        orders = [order for alert in alerts if alert.state is AlertState.OPEN for order in await self._orders(alert)]
        step = Step(self.asset, batch, self._dump(), tuple(predictions), tuple(alerts), tuple(orders))
        await self._commit(step)
        self._count(batch, predictions, alerts, arrived)

    async def _commit(self, step: Step) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self._store.commit(step)
                self._errors.pop("store", None)
                return
            except StoreError as error:
                self._errors["store"] = error
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
        now_ns = time.monotonic_ns()
        latency_ms = now_ns / 1e6 - arrived * 1e3
        self.latencies.extend(Latency(found.window_end_ns, now_ns, latency_ms) for found in predictions)
        if predictions:
            metrics.LATENCY.observe(latency_ms / 1e3, len(predictions), asset=self.asset)

    def _dump(self) -> bytes:
        states = {name: ModelState(j.windows.dump(), j.rules.dump()) for name, j in self._judges.items()}
        return msgspec.msgpack.encode(states)

    # ---- windows into predictions -----------------------------------------------------------------------------------

    async def _predict(self, judge_: _Judge, windows: Sequence[Window], live: bool, arrived: float) -> list[Prediction]:
        features = [(window, self._extract(judge_, window)) for window in windows]
        ready = [(window, found) for window, found in features if found is not None]
        predictions: list[Prediction] = []
        for part in _requests(ready, judge_.manifest.max_batch):
            answer = await self._ask(judge_, [found for _, found in part], live)
            if answer is None:
                self.counters.predictions_failed += len(part)
                continue
            answers, version = answer
            for (window, found), read in zip(part, answers, strict=True):
                if read is None:
                    self.counters.predictions_failed += 1
                    continue
                values, kind, confidence = read
                if self._record is not None:
                    self._record(judge_.manifest.name, found.tensors, window.end_ns, self.asset)
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

    def _extract(self, judge_: _Judge, window: Window) -> FeatureSet | None:
        """The window's features, with plain numbers as evidence, which every store and sink can write."""
        name = judge_.extractor.name
        try:
            found = judge_.extractor.extract(window)
            if found is not None:
                evidence = {key: float(value) for key, value in found.evidence.items()}
        except Exception as error:
            self.counters.extractor_errors += 1
            self._blame(f"extractor '{name}'", error)
            return None
        self._errors.pop(f"extractor '{name}'", None)
        if found is None:
            self.counters.windows_skipped += 1
            return None
        return FeatureSet(found.tensors, evidence)

    async def _ask(
        self, judge_: _Judge, features: Sequence[FeatureSet], live: bool
    ) -> tuple[Sequence[Answer | None], int] | None:
        """Ask the model for all windows at once, again while the error is retriable and patience lasts."""
        part = f"model '{judge_.manifest.name}'"
        patience_s = (KNOCK_S if judge_.silent else LIVE_PATIENCE_S) if live else REPLAY_PATIENCE_S
        deadline = time.monotonic() + patience_s
        delay_s = RETRY_FIRST_S
        while True:
            try:
                answer = await self._ask_once(judge_.manifest, features, deadline - time.monotonic())
                judge_.silent = False
                self._errors.pop(part, None)
                return answer
            except MillhandError as error:
                self._errors[part] = error
                if not error.retriable or time.monotonic() + delay_s > deadline:
                    judge_.silent = error.retriable
                    log.error("asset %s: %s gave no answer: %s", self.asset, part, error.message)
                    return None
            except Exception as error:
                self._blame(part, error)
                return None
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_LAST_S)

    async def _ask_once(
        self, manifest: Manifest, features: Sequence[FeatureSet], patience_s: float
    ) -> tuple[Sequence[Answer | None], int]:
        tensors = {name: np.stack([found.tensors[name] for found in features]) for name in features[0].tensors}
        try:
            async with asyncio.timeout(patience_s):
                outputs, version = await self._infer(manifest.name, tensors)
        except TimeoutError as error:
            raise DeadlineError(f"model '{manifest.name}' did not answer within {patience_s:.3g} s") from error
        return judge(manifest, outputs, len(features)), version

    async def _orders(self, alert: Alert) -> list[WorkOrder]:
        """The alert's work order; none where the writer fails, for an alert must not be lost with it."""
        part = f"order writer '{self._writer.name}'"
        try:
            history = await self._store.alerts(asset=self.asset, limit=self._history) if self._history else []
            order = self._writer.write(alert, [earlier for earlier in history if earlier.id != alert.id])
        except Exception as error:
            self.counters.orders_failed += 1
            self._blame(part, error)
            return []
        self._errors.pop(part, None)
        return [order]

    def _blame(self, part: str, error: Exception) -> None:
        """Keep the error of a plugin's part in mind and say it, with its traceback unless it was raised on purpose."""
        if isinstance(error, MillhandError):
            log.error("asset %s: %s: %s", self.asset, part, error.message)
            self._errors[part] = error
            return
        log.error("asset %s: %s failed", self.asset, part, exc_info=error)
        message = f"{part} failed: {type(error).__name__}: {error}"
        self._errors[part] = PluginError(message, hint="report this to the plugin's author")

    def unseen(self) -> dict[str, list[str]]:
        """Signals and waveforms that a model needs and that never came, by model."""
        found = {name: sorted(judge_.windows.unseen) for name, judge_ in self._judges.items()}
        return {name: names for name, names in found.items() if names}

    def window_counters(self) -> dict[str, dict[str, int]]:
        """What each model's windows left out."""
        return {name: msgspec.to_builtins(judge_.windows.counters) for name, judge_ in self._judges.items()}


def _requests(ready: Sequence[Judgeable], size: int) -> Iterator[Sequence[Judgeable]]:
    """Windows that can be asked together: neighbours of one shape, `size` at most. A growing history changes shape."""
    for _, same in itertools.groupby(ready, key=lambda one: {key: np.shape(t) for key, t in one[1].tensors.items()}):
        alike = list(same)
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _window_spec(manifest: Manifest) -> Any:
    if manifest.window is None:
        raise ModelError(f"model '{manifest.name}' has no [window]", hint="add it to model.toml")
    return manifest.window
