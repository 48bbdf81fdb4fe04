"""A language server in place of vLLM's, to try the benchmarks of several GPUs where there is none.

`environment` makes it known to an agent as the plugin `rehearsal`, on a recording of some H100. It takes what vLLM
would be given (the plugin's command line is made, and not run), asks for the key, and writes made-up words in steps.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from aiohttp import web
from shapes import SYLLABLES
from step_server import StepServer

from millhand.hookspecs import hookimpl
from millhand.language.launch import Command, Launch
from millhand_plugins.vllm.server import VllmServer
from millhand_plugins.vllm.settings import VllmSettings

STEP_MS = 12.0
"""Of one card; so many cards take as many times less."""
RECORDED = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>580.0</driver_version><cuda_version>13.0</cuda_version>{cards}</nvidia_smi_log>
"""
RECORDED_CARD = """<gpu id="00000000:0{index}:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
<uuid>GPU-{index}{index}</uuid><mig_mode><current_mig>Disabled</current_mig></mig_mode>
<fb_memory_usage><total>81559 MiB</total></fb_memory_usage></gpu>"""


class Rehearsed(VllmServer):
    """As vLLM, but for what is run."""

    name = "rehearsal"

    def missing(self) -> str:
        return ""

    def command(self, launch: Launch) -> Command:
        would = super().command(launch)
        step_ms = STEP_MS / len(launch.accelerators)
        argv = (sys.executable, str(Path(__file__).resolve()), str(launch.port), str(step_ms))
        return Command(argv, {"REHEARSED_KEY": launch.api_key}, note=" ".join(would.argv))


@hookimpl
def millhand_language_servers(config: Any) -> Sequence[Rehearsed]:
    return [Rehearsed(VllmSettings(interpreter=Path(sys.executable), device_uuids=True))]


def environment(folder: Path, cards: int) -> dict[str, str]:
    """For an agent: the plugin, and a recording of so many cards."""
    information = folder / "rehearsal-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rehearsal\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[millhand]\nrehearsal = rehearsal\n")
    recorded = folder / "nvidia-smi-q.xml"
    recorded.write_text(RECORDED.format(cards="".join(RECORDED_CARD.format(index=index) for index in range(cards))))
    places = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(places), "MILLHAND_NODE__HARDWARE_ROOT": str(recorded)}


class Words(StepServer):
    """Streams made-up words; answers whole where no stream is asked for, and says that it is well."""

    def __init__(self, step_s: float) -> None:
        super().__init__(step_s)
        self._key = os.environ.get("REHEARSED_KEY", "")

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/health":
            return web.json_response({})
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        if request.path == "/metrics":
            return web.Response(text=f"vllm:num_requests_running {self.open}\n")
        asked = await request.json()
        if asked.get("stream"):
            return await super().handle(request)
        text = " ".join("".join(random.choices(SYLLABLES, k=3)) for _ in range(asked["max_tokens"]))
        message = {"role": "assistant", "content": text}
        usage = {"completion_tokens": asked["max_tokens"]}
        return web.json_response(
            {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": usage}
        )


async def _serve(port: int, step_ms: float) -> None:
    server = Words(step_ms / 1000)
    runner = web.ServerRunner(web.Server(server.handle, handler_cancellation=True, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await server.run()


if __name__ == "__main__":
    import asyncio

    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
