"""The knowledge base on a real SQLite file: incremental, forgetting at once, filtered, whole after a kill."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from millhand.errors import InputError, StoreError, WorkerError
from millhand_plugins.knowledge.base import FILE, Knowledge
from millhand_plugins.knowledge.fusion import K, fuse
from millhand_plugins.knowledge.settings import KnowledgeConfig

DEADLINE_S = 60.0


class Letters:
    """An embedder of a kind: words are near that share pairs of letters. `broken` makes it fail."""

    model = "letters"

    def __init__(self) -> None:
        self.broken = False
        self.texts = 0

    async def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self.broken:
            raise WorkerError("no worker", hint="wait")
        self.texts += len(texts)
        rows = np.zeros((len(texts), 64), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for at in range(len(text) - 1):
                row[int(hashlib.sha256(text[at : at + 2].lower().encode()).hexdigest(), 16) % 64] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@pytest.fixture
async def base(tmp_path: Path) -> AsyncIterator[Knowledge]:
    knowledge = Knowledge(KnowledgeConfig())
    await knowledge.open(tmp_path / "kb", None)
    yield knowledge
    await knowledge.close()


@pytest.fixture
def manuals(tmp_path: Path) -> Path:
    folder = tmp_path / "manuals"
    folder.mkdir()
    (folder / "pump.md").write_text("# Pump\nReplace the mechanical seal of the slurry pump.\n")
    (folder / "parts.csv").write_text("number,text\n6309-2RS,deep groove ball bearing\n")
    (folder / "motor.txt").write_text("Measure the insulation of the winding.\n")
    return folder


async def names(base: Knowledge, query: str, **filters: object) -> list[str]:
    return [passage.source for passage in await base.search(query, **filters)]  # type: ignore[arg-type]


async def test_only_what_changed_is_read_again(base: Knowledge, manuals: Path) -> None:
    assert (await base.add(manuals))["added"] == 3
    assert (await base.add(manuals))["unchanged"] == 3
    (manuals / "pump.md").write_text("# Pump\nGrease the coupling.\n")
    (manuals / "motor.txt").unlink()
    counts = await base.add(manuals)
    assert (counts["added"], counts["unchanged"], counts["removed"]) == (1, 1, 1)
    assert await names(base, "mechanical seal") == []
    assert await names(base, "coupling") == ["pump.md"]
    assert await names(base, "insulation") == []
    assert [source["source"] for source in await base.sources()] == ["parts.csv", "pump.md"]


async def test_passages_carry_place_kind_and_a_stable_id(base: Knowledge, manuals: Path, tmp_path: Path) -> None:
    await base.add(manuals, ["pump-1"])
    (found,) = await base.search("6309-2RS")
    assert (found.place, found.kind, found.assets) == ("parts.csv, line 2", "parts", ("pump-1",))
    other = Knowledge(KnowledgeConfig())
    await other.open(tmp_path / "other", None)
    await other.add(manuals)
    assert [passage.id for passage in await other.search("6309-2RS")] == [found.id]
    await other.close()


async def test_shorthand_and_chinese_are_found(base: Knowledge) -> None:
    await base.add_text("order 1", "replace blown hydraulic hose", ["digger"])
    await base.add_text("order 2", "repl brg", ["digger"])
    await base.add_text("order 3", "泵发生汽蚀，清洁过滤器。", ["digger"])
    assert (await names(base, "hyd hse"))[0] == "order 1"
    assert (await names(base, "replace bearing"))[0] == "order 2"
    assert await names(base, "汽蚀") == ["order 3"]


async def test_assets_and_kinds_filter_words_and_vectors(tmp_path: Path) -> None:
    base = Knowledge(KnowledgeConfig())
    await base.open(tmp_path / "kb", Letters())
    await base.add_text("a", "the gearbox leaks oil", ["press"], "order")
    await base.add_text("b", "the gearbox leaks oil", ["saw"], "order")
    await base.add_text("c", "the gearbox leaks oil", [], "manual")
    await settled(base)
    assert set(await names(base, "gearbox")) == {"a", "b", "c"}
    assert set(await names(base, "gearbox", asset="press")) == {"a", "c"}
    assert set(await names(base, "gearbox", kinds=["order"])) == {"a", "b"}
    assert await names(base, "gearbox", asset="saw", kinds=["order"]) == ["b"]
    await base.close()


async def settled(base: Knowledge) -> None:
    """Wait until every passage has its vector."""

    async def wait() -> None:
        while await base._do(lambda: base._opened.without_vectors(1)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), DEADLINE_S)


async def test_vectors_find_what_words_do_not_and_go_with_their_source(tmp_path: Path) -> None:
    base, embed = Knowledge(KnowledgeConfig()), Letters()
    await base.open(tmp_path / "kb", embed)
    await base.add_text("a", "hydraulics overheated badly")
    await settled(base)
    assert await names(base, "hydraulix overheeted") == ["a"]
    assert await base.remove("a") == 1
    assert await names(base, "hydraulix overheeted") == []
    with pytest.raises(InputError, match="'a' is not known"):
        await base.remove("a")
    await base.close()


async def test_a_vector_that_comes_late_does_not_go_to_another_passage(base: Knowledge) -> None:
    await base.add_text("a", "forgotten")
    ((old, _, _),) = await base._do(lambda: base._opened.without_vectors(5))
    await base.remove("a")
    await base.add_text("b", "new")
    row = np.ones((1, 4), np.float32) / 2
    await base._do(lambda: base._opened.set_vectors([old], row))
    assert len(base._opened.matrix) == 0
    assert len(await base._do(lambda: base._opened.without_vectors(5))) == 1


async def test_an_embedder_that_fails_leaves_words_and_vectors_come_later(tmp_path: Path) -> None:
    base, embed = Knowledge(KnowledgeConfig()), Letters()
    embed.broken = True
    await base.open(tmp_path / "kb", embed)
    await base.add_text("a", "hydraulics overheated badly")
    assert await names(base, "hydraulics") == ["a"]
    embed.broken = False
    await settled(base)
    assert await names(base, "hydraulix") == ["a"]
    await base.close()


async def test_vectors_outlive_a_restart_and_another_embedder_makes_its_own(tmp_path: Path) -> None:
    base, embed = Knowledge(KnowledgeConfig()), Letters()
    await base.open(tmp_path / "kb", embed)
    await base.add_text("a", "hydraulics overheated badly")
    await settled(base)
    await base.close()
    made = embed.texts
    base = Knowledge(KnowledgeConfig())
    await base.open(tmp_path / "kb", embed)
    await settled(base)
    assert embed.texts == made
    assert await names(base, "hydraulix") == ["a"]
    await base.close()
    other = Letters()
    other.model = "other"
    base = Knowledge(KnowledgeConfig())
    await base.open(tmp_path / "kb", other)
    await settled(base)
    assert other.texts == 1
    await base.close()


async def test_one_bad_file_does_not_keep_the_others_out(base: Knowledge, manuals: Path) -> None:
    (manuals / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    counts = await base.add(manuals)
    assert counts["added"] == 3
    assert [Path(item["source"]).name for item in counts["refused"]] == ["bad.pdf"]
    with pytest.raises(InputError, match=r"bad\.pdf"):
        await base.add(manuals / "bad.pdf")


async def test_two_files_of_one_name_are_two_sources(base: Knowledge, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manual.md").write_text(f"about {folder}")
        await base.add(tmp_path / folder)
    assert [source["source"] for source in await base.sources()] == [str(tmp_path / "two" / "manual.md"), "manual.md"]
    await base.remove(str(tmp_path / "one" / "manual.md"))
    assert len(await base.sources()) == 1


async def test_a_full_knowledge_base_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    base = Knowledge(KnowledgeConfig(passages_cap=2))
    await base.open(tmp_path / "kb", None)
    await base.add_text("a", "first text")
    with pytest.raises(InputError, match=r"\[plugins.knowledge\]|exceed 2"):
        await base.add_text("a", "# A\n" + "word " * 1000)
    assert await names(base, "first") == ["a"]
    await base.close()


@pytest.mark.parametrize(
    "query", ['"', "* OR NEAR(", "a" * 100_000, "\udcff", "- - -", "col:um^2", "' ; DROP TABLE word"]
)
async def test_no_query_is_an_error(base: Knowledge, query: str) -> None:
    await base.add_text("a", "some text")
    await base.search(query)
    assert await names(base, "some") == ["a"]


async def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / FILE).write_bytes(b"no database " * 1000)
    base = Knowledge(KnowledgeConfig())
    await base.open(tmp_path / "kb", None)
    await base.add_text("a", "some text")
    assert await names(base, "some") == ["a"]
    await base.close()
    assert list((tmp_path / "kb").glob(f"{FILE}.damaged-*"))


async def test_a_file_that_breaks_while_it_is_open_is_told(base: Knowledge) -> None:
    await base.add_text("a", "some text")
    await base._do(lambda: base._opened._connection.execute("DROP TABLE word"))
    with pytest.raises(StoreError, match="cannot be read: no such table"):
        await base.search("text")
    with pytest.raises(StoreError, match="no such table"):
        await base.add_text("b", "other text")


WRITER = """
import asyncio, sys
from pathlib import Path
from millhand_plugins.knowledge.base import Knowledge
from millhand_plugins.knowledge.settings import KnowledgeConfig

async def main():
    base = Knowledge(KnowledgeConfig())
    await base.open(Path(sys.argv[1]), None)
    number = 0
    while True:
        number += 1
        await base.add_text(f"order {number}", "\\n\\n".join(f"part{number} " * 100 for _ in range(8)))
        print(number, flush=True)

asyncio.run(main())
"""


def killed_while_it_writes(folder: Path) -> int:
    """How many sources it has told of."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    told = 0
    while told < 12:
        told = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return told


async def test_after_kill_9_every_source_that_was_told_is_whole(tmp_path: Path) -> None:
    told = await asyncio.to_thread(killed_while_it_writes, tmp_path)
    base = Knowledge(KnowledgeConfig())
    await base.open(tmp_path, None)
    sources = await base.sources()
    assert len(sources) >= told
    assert len({source["passages"] for source in sources}) == 1
    for number in range(1, told + 1):
        assert set(await names(base, f"part{number}")) == {f"order {number}"}
    await base.close()


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([[1, 2], [2, 3]]) == [(2, 1 / (K + 2) + 1 / (K + 1)), (1, 1 / (K + 1)), (3, 1 / (K + 2))]
