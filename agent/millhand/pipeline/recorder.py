"""Keeps real inputs of models on this node, to fit lower precisions to: a bounded sample of each model's rows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from millhand.durable import temporary_prefix, write_durably
from millhand.errors import InputError
from millhand.pipeline.recorded import Recorded, recorded_path, source_of
from millhand.pipeline.reservoir import Reservoir, Sample
from millhand.pipeline.settings import RecordingSettings
from millhand.serving.manifest import Manifest

log = logging.getLogger("millhand.pipeline")

WORTH_A_SAVE = 50
"""Once a sample is full, it is written when one of so many rows has changed: fewer and fewer writes in a long life."""


class Recorder:
    """One for a node. `offer` is quick; files are read and written in threads."""

    def __init__(self, data_dir: Path, settings: RecordingSettings) -> None:
        self._data_dir = data_dir
        self._settings = settings
        self._reservoirs: dict[str, Reservoir] = {}
        self._errors: dict[str, str] = {}
        """Model -> why its rows could not be written."""
        self._files = asyncio.Lock()
        """Held while files are read, written or deleted."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to save now and then."""
        if self._settings.rows:
            self._task = asyncio.create_task(self._save_now_and_then(), name="recorder")

    async def stop(self) -> None:
        """Save what is not saved yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._save(lambda sample, changes: True)

    async def open(self, manifest: Manifest) -> None:
        """Begin to record a model, or go on where its file ends. Rows of another model.toml make way."""
        source, held = source_of(manifest), self._reservoirs.get(manifest.name)
        if not self._settings.rows or (held is not None and held.source == source):
            return
        fresh = Reservoir(manifest.name, self._settings.rows, self._settings.bytes_cap, source)
        async with self._files:
            try:
                recorded = await asyncio.to_thread(_read, recorded_path(self._data_dir, manifest.name))
                fresh.restore(recorded)
            except InputError as error:
                log.warning("%s; what is recorded of model '%s' begins anew", error.message, manifest.name)
            self._reservoirs[manifest.name] = fresh

    def offer(self, model: str, tensors: Mapping[str, NDArray[Any]], window_end_ns: int, asset: str) -> None:
        """Take one row into account that a model was asked about. tensors: input name -> array WITHOUT the batch."""
        reservoir = self._reservoirs.get(model)
        if reservoir is not None:
            reservoir.offer(tensors, window_end_ns, asset)

    async def facts(self, model: str) -> dict[str, Any]:
        """`Recorded.facts` of a model as of now, with `path`, `recording` and `error`. Raises InputError for a file
        that is damaged."""
        path, reservoir = recorded_path(self._data_dir, model), self._reservoirs.get(model)
        if reservoir is not None:
            found = await asyncio.to_thread(reservoir.sample().recorded)
        else:
            found = await asyncio.to_thread(_read, path)
        return {
            **found.facts(),
            "path": str(path),
            "recording": reservoir is not None,
            "error": self._errors.get(model, ""),
        }

    async def forget(self, model: str) -> None:
        """Delete what is recorded of a model; where an asset uses it, recording begins anew."""
        async with self._files:
            reservoir = self._reservoirs.get(model)
            if reservoir is not None:
                reservoir.clear()
            await asyncio.to_thread(recorded_path(self._data_dir, model).unlink, missing_ok=True)

    async def _save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._settings.save_s)
            await self._save(lambda sample, changes: changes * WORTH_A_SAVE >= len(sample.rows))

    async def _save(self, is_worth: Callable[[Sample, int], bool]) -> None:
        """Write the samples that have changed; `is_worth` says of a sample and its changes whether they are enough."""
        async with self._files:
            for model, reservoir in list(self._reservoirs.items()):
                sample, changes = reservoir.sample(), reservoir.changes
                if changes and is_worth(sample, changes):
                    reservoir.changes = 0
                    try:
                        await asyncio.to_thread(_write, recorded_path(self._data_dir, model), sample)
                        self._errors.pop(model, None)
                    except OSError as error:
                        reservoir.changes += changes
                        self._blame(model, error)

    def _blame(self, model: str, error: OSError) -> None:
        message = f"what is recorded of model '{model}' cannot be written: {error.strerror or error}"
        if self._errors.get(model) != message:
            log.error("%s", message)
        self._errors[model] = message


def _read(path: Path) -> Recorded:
    """What the file holds, nothing where there is none; what a killed process has left beside it goes."""
    for left in path.parent.glob(f"{temporary_prefix(path)}*"):
        with contextlib.suppress(OSError):
            left.unlink()
    try:
        return Recorded.read(path)
    except FileNotFoundError:
        return Sample((), (), 0, "").recorded()


def _write(path: Path, sample: Sample) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_durably(path, sample.recorded().encode(), mode=0o600)
