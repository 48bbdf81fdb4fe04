"""Other precisions of a language model: made, run on the real llama.cpp, proved, chosen, served; models compared."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_kit import Done, run
from gguf_kit import write_gguf

from millhand.config import load_config
from millhand.language.launch import Launch
from millhand.language.library import VERSION, open_library
from millhand.language.perplexity import output_head, perplexity
from millhand.language.plan import plan_of
from millhand.language.process import free_port
from millhand.language.requantise import requantise
from millhand.language.trial import TrialServer
from millhand.proof.document import PROOF
from millhand.workshop.shelf import open_shelf
from millhand_plugins.llamacpp.server import LlamacppServer
from millhand_plugins.llamacpp.settings import LlamacppSettings

pytest.importorskip("xllamacpp")

TEXT = "A pump that starts hard after a weekend has usually lost its prime. " * 5


class Node:
    """A node without a daemon, with one tiny model in F16."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_path = root / "millhand.toml"
        self.config_path.write_text(
            f'[node]\nid = "n"\ndata_dir = "{root}/data"\nrun_dir = "{root}/run"\n'
            '[workshop]\nlatency_s = 0.05\nmargin_percent = 0\n[language]\nmodel = "tiny"\nthreads = 1\n'
            f'[pack]\nname = "small"\nfolders = ["{root}/packs"]\n[plugins.llamacpp]\nuse = "xllamacpp"\n'
        )
        pack = root / "packs/small"
        (pack / "eval").mkdir(parents=True)
        (pack / "pack.toml").write_text('title = "Small"\nlicence = "Apache-2.0"\nlanguages = ["en"]\n')
        question = {"id": "a", "question": "What?", "candidates": ["this", "that"], "answer": 0}
        (pack / "eval/few.jsonl").write_text(json.dumps(question) + "\n")
        (root / "text.txt").write_text(TEXT)

    def millhand(self, *words: str | Path) -> Done:
        return run(self.config_path, *words)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="mh-") as folder:
        found = Node(Path(folder))
        assert found.millhand("model", "add", "tiny", write_gguf(found.root / "tiny.gguf")).code == 0
        yield found


@pytest.fixture(scope="module")
def built(node: Node) -> Done:
    """Two precisions, judged on a short text."""
    words = ("--only", "q8_0", "--only", "Q4_0", "--data", node.root / "text.txt")
    return node.millhand("model", "build", "tiny", *words)


@pytest.fixture(scope="module")
def server(node: Node) -> Iterator[TrialServer]:
    """Of the tiny model in F32, so that nothing is rounded on the way."""
    path = node.root / "wide.gguf"
    requantise(node.root / "tiny.gguf", path, "F32", lambda step, done, total: None)
    launch = Launch(name="t", model=path, port=free_port(), context_tokens=512, threads=1, embeddings=True)
    with TrialServer(LlamacppServer(LlamacppSettings(use="xllamacpp")), launch, node.root / "t.log") as found:
        yield found


def test_likelihoods_are_those_of_the_server(server: TrialServer, node: Node) -> None:
    head = output_head(node.root / "wide.gguf")
    tokens = [5, 17, 80, 12, 33, 7, 99, 4]
    hidden = np.asarray(
        server.post("/embedding", {"content": tokens, "embd_normalize": -1})[0]["embedding"], np.float32
    )
    answer = server.post("/completion", {"prompt": tokens, "n_predict": 1, "n_probs": 5, "temperature": 0})
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        loss = head.losses(hidden[-1:], np.asarray([entry["id"]]))
        assert -loss[0] == pytest.approx(entry["logprob"], abs=2e-3)


def test_perplexity_of_a_random_model_is_about_its_vocabulary(server: TrialServer, node: Node) -> None:
    value, judged = perplexity(server, output_head(node.root / "wide.gguf"), list(range(300)), lambda share: None)
    assert judged == 300 - 2, "the first token of each window has none before it"
    assert 200 < value < 600 and math.isfinite(value)


def test_precisions_are_proved_and_one_is_chosen(node: Node, built: Done) -> None:
    assert built.code == 0, built.error
    assert "perplexity on" in built.out and "a token" in built.out
    shelf = open_shelf(load_config(node.config_path))
    names = [candidate.name for candidate in shelf.candidates("tiny", VERSION, "cpu")]
    assert names == ["Q4_0", "Q8_0"]
    for name in names:
        proof = json.loads((shelf.place("tiny", VERSION, "cpu") / name / PROOF).read_text())
        assert proof["score"]["metric"] == "perplexity" and not proof["score"]["higher_is_better"]
        assert [latency["batch"] for latency in proof["latency"]] == [1, 128]
        assert proof["memory_bytes"] > 1 << 20 and proof["signatures"] and proof["executed"]
        assert proof["passed"] == (proof["score"]["drop_percent"] <= 1.2)
        assert any("the others changed by" in note for note in proof["notes"])
        assert any("tokens/s written" in note for note in proof["notes"])
    choice = shelf.choice("tiny", VERSION, "cpu")
    assert choice is not None and choice.candidate in ("", *names)


def test_how_it_is_served_best_is_proved_and_used(node: Node, built: Done) -> None:
    config = load_config(node.config_path)
    shelf = open_shelf(config)
    proof = json.loads((shelf.place("tiny", VERSION, "cpu") / "way" / PROOF).read_text())
    way, tried = proof["options"], proof["notes"][1:]
    assert proof["signatures"] and proof["reasons"][0] in " ".join(built.out.split())
    assert (way["program"], way["threads"]) == ("xllamacpp", 1) and way["release"].startswith("xllamacpp 20")
    for kind in ("ngram", "ngram-simple", "ngram-mod", "ngram-cache"):
        (line,) = (line for line in tried if f"drafts by {kind}:" in line)
        assert any(word in line for word in ("the same answers", "is another from token", "now another"))
    _, _, plan = plan_of(config)
    assert plan.head.speculation == way["speculation"] and plan.head.program == "xllamacpp"
    assert f"way: {proof['reasons'][0]}" in plan.reasons
    node.config_path.write_text(node.config_path.read_text().replace("threads = 1", "threads = 2"))
    try:
        _, _, other = plan_of(load_config(node.config_path))
        assert (other.head.threads, other.head.speculation, other.head.program) == (2, "none", "")
        assert any("under other settings" in reason for reason in other.reasons)
    finally:
        node.config_path.write_text(node.config_path.read_text().replace("threads = 2", "threads = 1"))


def test_what_lies_on_the_shelf_is_not_made_again(node: Node, built: Done) -> None:
    again = node.millhand("model", "build", "tiny", "--only", "Q8_0", "--data", node.root / "text.txt", "--json")
    outcomes = again.data["outcomes"]
    assert [(outcome["name"], outcome["made"]) for outcome in outcomes] == [("Q8_0", False)]
    assert set(again.data["candidates"]) == {"Q4_0", "Q8_0"}
    assert node.millhand("model", "compare", "tiny").out
    proof = node.millhand("model", "proof", "tiny", "--candidate", "Q8_0")
    assert proof.code == 0 and "perplexity" in proof.out and "batch 128" in proof.out
    assert "there are: Q4_0, Q8_0" in node.millhand("model", "proof", "tiny", "--candidate", "F16").error


def test_the_chosen_precision_serves_while_its_proof_holds(node: Node, built: Done) -> None:
    config = load_config(node.config_path)
    shelf, library = open_shelf(config), open_library(config)
    choice = shelf.choice("tiny", VERSION, "cpu")
    assert choice is not None
    model = library.model("tiny")
    for name in ("Q8_0", "Q4_0"):
        candidate = shelf.find("tiny", VERSION, "cpu", name)
        proof = json.loads((candidate.folder / PROOF).read_text())
        shelf.choose("tiny", VERSION, "cpu", type(choice)(**{**_plain(choice), "candidate": name}))
        served = library.served(model, "cpu")
        if not proof["passed"]:
            assert served.path == model.path and "it is refused" in served.why
            continue
        assert served.path == candidate.artifact and served.precision == name
        assert plan_of(config)[2].head.model == candidate.artifact
        assert "proved" in node.millhand("model", "verify", "tiny").out
        whole = candidate.artifact.read_bytes()
        candidate.artifact.write_bytes(whole[:-1] + b"\x00" if whole[-1] else whole[:-1] + b"\x01")
        served = library.served(model, "cpu")
        assert served.path == model.path and "is not what was proved" in served.why
        assert node.millhand("model", "verify", "tiny").code == 1
        candidate.artifact.write_bytes(whole)
    shelf.choose("tiny", VERSION, "cpu", choice)


def _plain(choice: object) -> dict[str, str]:
    return {name: getattr(choice, name) for name in ("candidate", "source_sha256", "why", "date")}


def test_a_model_is_proved_as_it_is(node: Node, built: Done) -> None:
    assert "there is no proof.json" in node.millhand("model", "proof", "tiny", "--candidate", "original").error
    proved = node.millhand("model", "prove", "tiny", "--data", node.root / "text.txt", "--json")
    assert proved.code == 0, proved.error
    proof = proved.data["proof"]
    assert proved.data["state"] == "proved" and proof["candidate"] == "" and proof["precision"] == "F16"
    assert proof["score"]["metric"] == "perplexity" and 200 < proof["score"]["original"] < 600
    assert [latency["batch"] for latency in proof["latency"]] == [1, 128] and proof["memory_bytes"] > 1 << 20
    assert proof["bytes"] == (node.root / "tiny.gguf").stat().st_size and "tokens/s written" in proof["notes"][0]
    shown = node.millhand("model", "proof", "tiny", "--candidate", "original")
    assert shown.code == 0 and shown.out.startswith("Proved") and "perplexity" in shown.out
    states = {entry["artifact"]: entry["state"] for entry in node.millhand("model", "verify", "tiny", "--json").data}
    assert states["its own"] == "proved" and "cpu/Q8_0" in states
    assert "on 'cpu' here" in node.millhand("model", "prove", "tiny", "--target", "sm80").error


def test_a_changed_model_is_noticed(node: Node) -> None:
    model = open_library(load_config(node.config_path)).model("tiny")
    whole = model.path.read_bytes()
    model.path.write_bytes(whole + b"more")
    try:
        assert "is not what was added" in node.millhand("model", "verify", "tiny").error
        assert "is not what was added" in node.millhand("model", "build", "tiny", "--only", "Q8_0").error
    finally:
        model.path.write_bytes(whole)
    assert node.millhand("model", "verify", "tiny").code in (0, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--only", "Q3_K"), "cannot be made"),
        (("--target", "a100"), "not for language models"),
        (("--data", "nowhere.txt"), "cannot be read as a text"),
    ],
    ids=["precision", "target", "text"],
)
def test_what_cannot_be_built_is_refused(node: Node, words: tuple[str, ...], told: str) -> None:
    done = node.millhand("model", "build", "tiny", *words)
    assert done.code == 1 and told in done.error


def test_a_text_that_is_too_short(node: Node) -> None:
    short = node.root / "short.txt"
    short.write_text("too short")
    done = node.millhand("model", "build", "tiny", "--only", "F32", "--data", short)
    assert "9 tokens, which say too little" in " ".join((done.out + done.err).split())


def test_models_are_ranked(node: Node) -> None:
    assert node.millhand("model", "add", "other", write_gguf(node.root / "other.gguf", seed=9)).code == 0
    words = ("tiny", "other", "--data", node.root / "text.txt", "--json")
    done = node.millhand("model", "compare", *words)
    assert done.code == 0, done.error
    ranked = done.data["models"]
    assert {entry["name"] for entry in ranked} == {"tiny", "other"}
    keys = [(-entry["right"], entry["bits_per_byte"]) for entry in ranked]
    assert keys == sorted(keys) and all(entry["questions"] == 1 for entry in ranked)
    for entry in ranked:
        bits = math.log2(entry["perplexity"]) * entry["tokens"] / len(TEXT.encode())
        assert entry["bits_per_byte"] == pytest.approx(bits)
    assert "is no language model" in node.millhand("model", "compare", "tiny", "rig-fault").error
