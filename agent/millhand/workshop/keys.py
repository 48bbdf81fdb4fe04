"""What this machine has that candidates may be tied to, asked of their makers once in a daemon's life."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from millhand.errors import ModelError, PluginError, suggestion
from millhand.registry import Registry
from millhand.serving.process import native_environment, python_command
from millhand.workshop.key_process import Answer, Question
from millhand.workshop.recipe import Made, Target

MODULE = "millhand.workshop.key_process"
DEADLINE_S = 30.0
"""A GPU library that has never been loaded since the boot takes ten seconds and more on a slow disk."""
WORDS_BYTES = 400


class Keys:
    """The keys of this machine, by maker and target."""

    def __init__(self, registry: Registry, interpreter: Path | None = None) -> None:
        """`interpreter`: that of the workshop's processes; None takes the daemon's own."""
        self._registry = registry
        self._interpreter = interpreter
        self._asked: dict[tuple[str, str], asyncio.Task[dict[str, str]]] = {}

    async def differences(self, maker: str, made: Made, target: Target) -> list[str]:
        """In what the machine differs from what a candidate is tied to, one sentence each; empty where it fits.

        Raises ModelError or PluginError where it cannot be told.
        """
        if not made.key:
            return []
        now = await self.now(maker, target)
        return [
            f"{name} was {value}, is {now.get(name, 'not here')}"
            for name, value in made.key.items()
            if now.get(name) != value
        ]

    async def now(self, maker: str, target: Target) -> Mapping[str, str]:
        """What a maker's candidates would be tied to. Raises ModelError or PluginError where it cannot be told."""
        task = self._asked.get((maker, target.accelerator))
        if task is None:
            task = self._asked[maker, target.accelerator] = asyncio.create_task(self._ask(maker, target))
        try:
            return await asyncio.shield(task)
        except PluginError:
            self._asked.pop((maker, target.accelerator), None)  # the plugin may come up
            raise

    async def stop(self) -> None:
        """End the processes that still look."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        self._asked.clear()

    async def _ask(self, maker: str, target: Target) -> dict[str, str]:
        question = msgspec.json.encode(self._question(maker, target)).decode()
        process = await self._start(maker, target, question)
        try:
            async with asyncio.timeout(DEADLINE_S):
                out, err = await process.communicate()
        except TimeoutError as error:
            raise ModelError(
                f"maker '{maker}' did not say within {DEADLINE_S:g} s what this machine has",
                hint="look at the driver (nvidia-smi), then start the agent again",
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        try:
            answer = msgspec.json.decode(out, type=Answer)
        except msgspec.MsgspecError as error:
            words = err.decode(errors="replace").strip()[-WORDS_BYTES:]
            raise ModelError(
                f"maker '{maker}' took its process down: {words or f'status {process.returncode}'}",
                hint="report this to the author of the plugin",
            ) from error
        if answer.message:
            raise ModelError(answer.message, hint=answer.hint)
        return answer.key

    async def _start(self, maker: str, target: Target, question: str) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                *python_command(self._interpreter, MODULE, question),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=native_environment(target.accelerator, 1),
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(
                f"maker '{maker}' cannot be asked with '{self._interpreter or sys.executable}': {error.strerror}",
                hint="mend [models] interpreter or the profile's",
            ) from error

    def _question(self, maker: str, target: Target) -> Question:
        makers = {found.name: plugin for plugin, found in self._registry.collect("millhand_makers")}
        if maker not in makers:
            raise PluginError(
                f"no loaded plugin brings the maker '{maker}'{suggestion(maker, makers)}",
                hint="name its plugin under [plugins]",
            )
        plugin = self._registry.plugins[makers[maker]]
        options = {} if plugin.config is None else plugin.config.model_dump(mode="json")
        return Question(maker=maker, module=plugin.module.partition(":")[0], options=options, target=target)
