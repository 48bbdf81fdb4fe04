"""kill -9 in mid-stream: no committed step is lost, none is doubled, no counter is used twice."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from millhand.records import Batch, Clock, Prediction, Reading
from millhand.store import Step, Store

def step(index):
    clock = Clock(index * 10**9, index * 10**9, index)
    readings = tuple(Reading(f"m{number}", index, "g", clock) for number in range(15))
    prediction = Prediction("pump", "rul", 1, index, index + 1, {"rul": float(index)})
    return Step("pump", Batch(readings, cursor=str(index).encode()), str(index).encode() * 50, (prediction,))

async def main():
    store = await Store.open(Path(sys.argv[1]))
    cursor, state = await store.resume("pump")
    start = 0 if cursor is None else int(cursor) + 1
    assert state is None or state == cursor * 50
    print("bdseq", await store.next_bdseq(), store.epoch, flush=True)

    async def commit(index):
        await store.commit(step(index))
        print(index, flush=True)

    for first in itertools.count(start, 4):
        await asyncio.gather(*(commit(index) for index in range(first, first + 4)))

asyncio.run(main())
"""


def run_and_kill(path: Path, lines: int) -> tuple[str, list[int]]:
    """Let a writer print `lines` committed steps, kill it, and return its first line and all that it printed."""
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        printed = [int(process.stdout.readline()) for _ in range(lines)]
        process.kill()
        rest = process.stdout.read()
    printed += [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    return first.strip(), printed


async def test_ten_kills(kit, path):
    chance = random.Random(4)
    committed: set[int] = set()
    content: dict[int, bytes] = {}
    for number in range(10):
        first, printed = run_and_kill(path, chance.randrange(1, 120))
        committed |= set(printed)
        async with kit.opened(path) as store:
            assert first == f"bdseq {number} {store.epoch}"
            rows = await store.pending("bulk", 0, 100_000)
            for row in rows:
                assert content.setdefault(row.seq, row.body) == row.body, "a seq was used twice"
            assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
            indexes = [row.record().readings[0].value for row in rows]
            assert indexes == list(range(len(rows))), "a step is lost or doubled"
            assert committed <= set(indexes)
            assert await store.resume("pump") == (str(indexes[-1]).encode(), str(indexes[-1]).encode() * 50)
            predictions = await store.predictions("pump", limit=100_000)
            assert [int(prediction.values["rul"]) for prediction in predictions] == indexes
            counts = [rollup.count for rollup in await store.rollups("pump", "m0")]
            assert sum(counts) == len(indexes)
            assert not store.set_aside
    assert len(committed) > 100
