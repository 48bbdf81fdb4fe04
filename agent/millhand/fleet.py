"""The assets of this node: one pipeline and one runner each, and the sinks their alerts and orders go to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from millhand.assets import adapter_kinds, create_adapter
from millhand.errors import ConfigError, InputError, MillhandError, suggestion
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.features import builtin_extractors
from millhand.pipeline.runner import AssetRunner
from millhand.pipeline.sinks import SinkRunner

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.hookspecs import FeatureExtractor, OrderWriter
    from millhand.pipeline.asset import Latency
    from millhand.pipeline.recorder import Recorder
    from millhand.pipeline.settings import AssetSettings
    from millhand.registry import Registry
    from millhand.serving.manifest import Manifest
    from millhand.serving.pool import ModelPool
    from millhand.store import Store
    from millhand.telemetry.publisher import Publisher

log = logging.getLogger("millhand.fleet")


class Fleet:
    """Starts, changes and stops the assets that config names. One that cannot start waits and says why."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        store: Store,
        pool: ModelPool,
        recorder: Recorder,
        publisher: Publisher | None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._store = store
        self._pool = pool
        self._recorder = recorder
        self._publisher = publisher
        self._runners: dict[str, AssetRunner] = {}
        self._settings: dict[str, AssetSettings] = {}
        self._waiting: dict[str, MillhandError] = {}
        self._unjudged: dict[str, MillhandError] = {}
        """Assets that are read while a model of theirs is missing."""
        self._manifests: dict[str, list[Manifest]] = {}
        """What each asset's pipeline was made with."""
        self._sinks: list[SinkRunner] = []
        self._sink_plugins: set[str] = set()
        """Plugins that were asked for sinks."""

    async def start(self) -> None:
        await self.apply(self._config, self._publisher)

    async def apply(self, config: Config, publisher: Publisher | None) -> None:
        """Start what is new, restart what changed or lacks a model, stop what is gone; leave the rest alone.

        An asset has changed as well where model.toml of a model of its has, and that model serves.
        """
        rewritten = config.orders != self._config.orders
        self._config, self._publisher = config, publisher
        await self._start_new_sinks()
        wanted = {asset.name: asset for asset in config.assets}
        for name, settings in list(self._settings.items()):
            if rewritten or wanted.get(name) != settings or self._is_outdated(name):
                await self._runners.pop(name).stop()
                self._settings.pop(name)
        kinds, extractors = adapter_kinds(self._registry), self._extractors()
        for name, settings in wanted.items():
            if name not in self._runners:
                await self._start_asset(settings, kinds, extractors)
        self._waiting = {name: error for name, error in self._waiting.items() if name in wanted}
        await self._tell_publisher()

    async def stop(self) -> None:
        await asyncio.gather(*(runner.stop() for runner in self._runners.values()))
        await asyncio.gather(*(sink.stop() for sink in self._sinks))

    def statuses(self) -> list[dict[str, Any]]:
        """The state of every asset, also of those that wait."""
        running = [self._with_missing_model(runner.status()) for runner in self._runners.values()]
        waiting = [
            {"asset": name, "state": "waiting", "error": error.message, "hint": error.hint}
            for name, error in self._waiting.items()
        ]
        return sorted([*running, *waiting], key=lambda status: str(status["asset"]))

    def _with_missing_model(self, status: dict[str, Any]) -> dict[str, Any]:
        error = self._unjudged.get(str(status["asset"]))
        if error is not None and not status["error"]:
            status |= {"error": error.message, "hint": error.hint}
        return status

    def latencies(self, asset: str) -> list[Latency]:
        """How long the asset's last predictions took. Raises InputError for an asset that does not run."""
        if asset not in self._runners:
            raise InputError(
                f"no asset '{asset}' runs{suggestion(asset, self._runners)}", hint="'millhand' lists the assets"
            )
        return list(self._runners[asset].pipeline.latencies)

    def sink_statuses(self) -> list[dict[str, Any]]:
        return [sink.status() for sink in self._sinks]

    async def _start_new_sinks(self) -> None:
        """Start the sinks of plugins that came up since the last look; those that run keep their place."""
        asked = set(self._sink_plugins)
        for plugin, sink in self._registry.collect("millhand_sinks"):
            self._sink_plugins.add(plugin)
            if plugin not in asked:
                runner = SinkRunner(sink, self._store)
                await runner.start()
                self._sinks.append(runner)

    async def _start_asset(
        self, settings: AssetSettings, kinds: Mapping[str, Any], extractors: Mapping[str, FeatureExtractor]
    ) -> None:
        try:
            adapter = create_adapter(settings, kinds)
            models = list(self._models(settings, extractors))
            pipeline = AssetPipeline(
                settings,
                models=models,
                infer=self._pool.infer,
                store=self._store,
                writer=self._writer(),
                history=self._config.orders.history,
                record=self._recorder.offer,
            )
        except MillhandError as error:
            self._waiting[settings.name] = error
            log.error("asset %s cannot start: %s", settings.name, error.message)
            return
        self._waiting.pop(settings.name, None)
        for manifest, _ in models:
            await self._recorder.open(manifest)
        runner = AssetRunner(adapter, pipeline, on_alive=self._report_alive)
        self._runners[settings.name], self._settings[settings.name] = runner, settings
        self._manifests[settings.name] = [manifest for manifest, _ in models]
        await runner.start()

    async def _tell_publisher(self) -> None:
        """Tell a publisher, which may be new, which of all assets that the store knows speak now."""
        if self._publisher is None:
            return
        for name in {*await self._store.assets(), *self._runners}:
            runner = self._runners.get(name)
            self._publisher.set_asset_alive(name, runner is not None and runner.alive)

    def _report_alive(self, asset: str, alive: bool) -> None:
        if self._publisher is not None:
            self._publisher.set_asset_alive(asset, alive)

    def _is_outdated(self, asset: str) -> bool:
        """Whether a model has come or changed since the asset was started."""
        if asset in self._unjudged:
            return True
        return any(self._pool.manifest(manifest.name) != manifest for manifest in self._manifests[asset])

    def _models(
        self, settings: AssetSettings, extractors: Mapping[str, FeatureExtractor]
    ) -> Iterator[tuple[Manifest, FeatureExtractor]]:
        """The models that can judge the asset. One that cannot is reported; it never costs the asset's readings."""
        self._unjudged.pop(settings.name, None)
        for name in settings.models:
            try:
                yield self._model(settings, name, extractors)
            except MillhandError as error:
                self._unjudged[settings.name] = error
                log.error("asset %s is read without model %s: %s", settings.name, name, error.message)

    def _model(
        self, settings: AssetSettings, name: str, extractors: Mapping[str, FeatureExtractor]
    ) -> tuple[Manifest, FeatureExtractor]:
        manifest = self._pool.manifest(name)
        if manifest.window is None or manifest.prediction is None:
            raise ConfigError(
                f"asset '{settings.name}': model '{name}' has no [window] and [prediction]",
                hint="a pipeline needs both in the model's model.toml",
            )
        extractor = extractors.get(manifest.features.extractor)
        if extractor is None:
            raise ConfigError(
                f"model '{name}': extractor '{manifest.features.extractor}' is not known"
                f"{suggestion(manifest.features.extractor, extractors)}",
                hint="name the plugin that brings it under [plugins]",
            )
        return manifest, extractor

    def _extractors(self) -> dict[str, FeatureExtractor]:
        brought = [extractor for _, extractor in self._registry.collect("millhand_extractors")]
        return {extractor.name: extractor for extractor in [*builtin_extractors(), *brought]}

    def _writer(self) -> OrderWriter:
        writers: dict[str, OrderWriter] = {
            writer.name: writer for _, writer in self._registry.collect("millhand_order_writers")
        }
        name = self._config.orders.writer
        if name not in writers:
            raise ConfigError(
                f"[orders] writer = '{name}' is not known{suggestion(name, writers)}",
                hint="'millhand plugin list' shows which writers' plugins are loaded",
            )
        return writers[name]
