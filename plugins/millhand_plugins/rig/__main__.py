"""Run the rig: `python -m millhand_plugins.rig --port 5020 --seed 7 --fault bearing_outer`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from millhand_plugins.rig.asset import FAULTS
from millhand_plugins.rig.operation import END_MS
from millhand_plugins.rig.server import RigClock, RigLog, RigServer
from millhand_plugins.rig.simulator import Simulator


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or with --exit-at-end until the life is over. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except OSError as error:
        sys.stderr.write(f"Error: the rig cannot listen or log: {error}\nTry: another --port or --log\n")
        return 1


async def _run(options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    simulator = Simulator(options.seed, options.fault)
    rig_log = RigLog(options.log, simulator.truth() | {"scale": options.scale})
    clock = RigClock(options.scale)
    asked = asyncio.Event()
    server = RigServer(simulator, clock, rig_log, on_request=asked.set)
    port = await server.start(options.host, options.port)
    sys.stdout.write(json.dumps({"ready": True, "host": options.host, "port": port, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    if options.wait:
        await _first_of(stop, asked)
    clock.start()
    reason = await _wait(stop, END_MS / 1000 / options.scale if options.exit_at_end else None)
    await server.close()
    rig_log.write({"kind": "end", "time_ms": clock(), "sequence": server.sequence, "reason": reason})
    rig_log.close()
    return 0


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _wait(stop: asyncio.Event, limit_s: float | None) -> str:
    try:
        await asyncio.wait_for(stop.wait(), limit_s)
    except TimeoutError:
        return "end of life"
    return "signal"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m millhand_plugins.rig", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5020, help="port, 0 for a free one (default 5020)")
    parser.add_argument("--seed", type=_natural, default=7, help="which rig of all (default 7)")
    parser.add_argument("--fault", choices=FAULTS, default="bearing_outer", help="how its life ends")
    parser.add_argument("--scale", type=_positive, default=1.0, help="rig seconds a second (default 1: a life in 35 s)")
    parser.add_argument("--log", type=Path, help="write JSON lines of all that was served to this file")
    parser.add_argument("--wait", action="store_true", help="let the life begin with the first request")
    parser.add_argument("--exit-at-end", action="store_true", help="end two rig seconds after the end of life")
    return parser


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
