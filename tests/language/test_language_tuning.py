"""Which way of serving a language model is chosen: faster beyond the noise, and the same greedy answer to the token."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_kit import write_gguf

from millhand.hookspecs import TunableServer
from millhand.language.launch import Ability, Command, Launch, ServerFigures, Speculation
from millhand.language.library import Library
from millhand.language.process import free_port
from millhand.language.samples import read_samples
from millhand.language.trial import TrialServer
from millhand.language.tuning import QUESTIONS, Tuned, Tuner, _ask, _prompts, changes_of
from millhand.language.way import Way
from millhand.language.way_proof import _drafts
from millhand_plugins.llamacpp.server import LlamacppServer
from millhand_plugins.llamacpp.settings import LlamacppSettings

PROGRAM = Path(__file__).parent / "kit" / "tunable.py"
UNDER = {"threads": 0, "speculation": "none"}
SAME = [5, 6, 7]
COUNT = len(QUESTIONS)


class StandIn:
    """Behaves by the launch: `ways` has what each kind of speculation, program and number of threads does."""

    name = "standin"
    formats: Sequence[str] = ("gguf",)
    abilities: frozenset[Ability] = frozenset({"chat"})
    speculations: Sequence[Speculation] = ("ngram", "draft")

    def __init__(self, **ways: Mapping[str, Any]) -> None:
        self._ways = ways
        self.launches: list[Launch] = []

    def missing(self) -> str:
        return ""

    def programs(self) -> Mapping[str, str]:
        return {"own": "own 1", "other": "other 2"}

    def command(self, launch: Launch) -> Command:
        self.launches.append(launch)
        plain = {"tokens": SAME, "ms": [100.0]}
        keys = (launch.speculation, launch.program, f"threads{launch.threads}")
        told = next((self._ways[key] for key in keys if key in self._ways), plain)
        return Command((sys.executable, os.fspath(PROGRAM), str(launch.port), json.dumps(told)))

    def figures(self, metrics: str) -> ServerFigures:
        return ServerFigures()


def tune(server: StandIn, tmp_path: Path, drafts: Mapping[str, Path] | None = None) -> Tuned:
    assert isinstance(server, TunableServer)
    drafts = drafts or {}
    tuner = Tuner(
        server=server,
        launch=Launch(name="m", model=tmp_path / "m.gguf", port=0, context_tokens=64),
        drafts=drafts,
        margin=0.05,
        seconds=0.0,
        scratch=tmp_path,
    )
    base = Way(threads=2, program="own", release="own 1", speculation="none", under=UNDER)
    changes = changes_of(server, base, dict.fromkeys(drafts, "hash"), UNDER)
    return tuner.tune(base, changes, "A text.", lambda way: None)


def test_the_default_stays_where_nothing_is_faster(tmp_path: Path) -> None:
    tuned = tune(StandIn(ngram={"tokens": SAME, "ms": [160.0]}), tmp_path)
    assert (tuned.way.threads, tuned.way.program, tuned.way.speculation) == (2, "own", "none")
    assert "nothing that was tried is faster" in tuned.why and tuned.latency == ()
    assert len(tuned.tried) == 3 and all("no gain" in line for line in tuned.tried)
    assert "160% of the time" in tuned.tried[2]


def test_what_is_faster_with_the_same_answers_is_taken_one_after_the_other(tmp_path: Path) -> None:
    server = StandIn(
        threads1={"tokens": SAME, "ms": [80.0]},
        other={"tokens": SAME, "ms": [60.0]},
        ngram={"tokens": SAME, "ms": [30.0]},
    )
    tuned = tune(server, tmp_path)
    assert (tuned.way.threads, tuned.way.program, tuned.way.release) == (1, "other", "other 2")
    assert tuned.way.speculation == "ngram" and tuned.way.under == UNDER
    assert "50% of the time" in tuned.why and "every token was the same" in tuned.why
    assert tuned.latency[0].p50_ms == pytest.approx(30 / len(SAME))
    assert tuned.latency[0].original_p50_ms == pytest.approx(60 / len(SAME))
    assert [line.count("faster") for line in tuned.tried] == [1, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "place"), [([5, 9, 7], 2), ([5, 6], 3), ([5, 6, 7, 8], 4)], ids=["another", "shorter", "longer"]
)
def test_another_answer_is_refused_however_fast(tmp_path: Path, tokens: list[int], place: int) -> None:
    tuned = tune(StandIn(ngram={"tokens": tokens, "ms": [1.0]}), tmp_path)
    assert tuned.way.speculation == "none"
    assert f"refused, its greedy answer 1 is another from token {place} on" in tuned.tried[-1]


def test_a_gain_within_the_noise_is_none(tmp_path: Path) -> None:
    noisy = [100.0] * COUNT + [140.0] * COUNT
    tuned = tune(StandIn(own={"tokens": SAME, "ms": noisy}, ngram={"tokens": SAME, "ms": [95.0]}), tmp_path)
    assert tuned.way.speculation == "none" and "noise 3" in tuned.tried[-1]


def test_one_that_does_not_start_is_told(tmp_path: Path) -> None:
    tuned = tune(StandIn(other={"wrong": 1}), tmp_path)
    assert tuned.way.program == "own" and "other" in tuned.tried[1] and "refused" in tuned.tried[1]


def test_a_model_that_drafts(tmp_path: Path) -> None:
    server = StandIn(draft={"tokens": SAME, "ms": [40.0]})
    tuned = tune(server, tmp_path, {"little": tmp_path / "little.gguf"})
    assert (tuned.way.speculation, tuned.way.draft, tuned.way.draft_sha256) == ("draft", "little", "hash")
    assert server.launches[-1].draft == tmp_path / "little.gguf"


def test_what_the_owner_has_said_is_not_tried() -> None:
    base = Way(threads=8, program="own", release="own 1", speculation="none", under={})
    changes = changes_of(StandIn(), base, {}, UNDER)
    assert [change.get("threads") for change in changes] == [7, 4, None, None]
    said = changes_of(StandIn(), base, {"little": "hash"}, {"threads": 8, "speculation": "ngram"})
    assert said == [{"program": "other", "release": "other 2"}]


def test_only_smaller_models_of_the_same_vocabulary_draft(tmp_path: Path) -> None:
    for name, parameters, words in (
        ("big", 4000, 300),
        ("little", 1000, 300),
        ("half", 3000, 300),
        ("strange", 1000, 299),
    ):
        write_gguf(tmp_path / name / "m.gguf", words=words)
        (tmp_path / name / "language.toml").write_text(
            f'format = "gguf"\nfile = "m.gguf"\nparameters = {parameters}\n[sha256]\n"m.gguf" = "{"0" * 64}"\n'
        )
    library = Library([tmp_path])
    assert list(_drafts(library, library.model("big"))) == ["little"]


@pytest.mark.long
def test_drafts_from_the_text_keep_the_greedy_answer_of_a_real_model(smollm: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    server = LlamacppServer(LlamacppSettings(use="xllamacpp"))

    def launch(speculation: Speculation) -> Launch:
        return Launch(name="m", model=smollm, port=free_port(), context_tokens=1024, threads=2, speculation=speculation)

    text = (
        "1. Stop the pump and lock it out. 2. Open the drain valve. 3. Take off the gland and look at the packing. " * 3
    )
    drafting = launch("ngram")
    with (
        TrialServer(server, launch("none"), tmp_path / "plain.log") as plain,
        TrialServer(server, drafting, tmp_path / "ngram.log") as ngram,
    ):
        prompts = _prompts(plain, text)
        assert _ask(plain, prompts).tokens == _ask(ngram, prompts).tokens
        with urllib.request.urlopen(f"http://127.0.0.1:{drafting.port}/metrics", timeout=30) as page:
            figures = read_samples(page.read().decode())
    assert figures["llamacpp:spec_decode_num_accepted_tokens_total"] > 0
