"""Which server serves a model, on which GPUs, and why: config, then profile, then the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millhand.errors import ConfigError, ModelError
from millhand.hardware.facts import Accelerator, Cpu, Hardware, Memory, Topology
from millhand.language.launch import Command, Launch, ServerFigures
from millhand.language.library import Library
from millhand.language.plan import Plan, make_plan
from millhand.language.settings import LanguageSettings
from millhand.profiles import Match, load_profiles, match

PROFILES = Path(__file__).parents[3] / "profiles" / "millhand_profiles"
GIB = 1 << 30


@dataclasses.dataclass
class Server:
    """A language server that starts nothing."""

    name: str
    formats: tuple[str, ...] = ("gguf",)
    lacks: str = ""
    abilities: frozenset[Any] = frozenset({"chat", "embeddings"})

    def missing(self) -> str:
        return self.lacks

    def command(self, launch: Launch) -> Command:
        return Command((self.name,), note=f"by {self.name}")

    def figures(self, metrics: str) -> ServerFigures:
        return ServerFigures()


LLAMACPP, VLLM = Server("llamacpp"), Server("vllm", ("huggingface",))
CPU = Hardware(cpu=Cpu(cores=4, logical=8, usable=8), memory=Memory(total_bytes=16 * GIB, available_bytes=12 * GIB))


def node(gpus: int, link: str) -> Hardware:
    """A100 cards of 80 GB, each joined to each other by `link`; or by pairs, the rest across PCIe."""
    cards = tuple(
        Accelerator(
            index=index,
            uuid=f"GPU-{index}",
            name="NVIDIA A100-SXM4-80GB",
            memory_bytes=80 * GIB,
            compute_capability="8.0",
            mig_enabled=False,
            ready=True,
        )
        for index in range(gpus)
    )

    def joined(one: int, other: int) -> str:
        if one == other:
            return "X"
        return link if link != "pairs" else "NV12" if one // 2 == other // 2 else "SYS"

    links = tuple(tuple(joined(one, other) for other in range(gpus)) for one in range(gpus))
    return msgspec.structs.replace(CPU, accelerators=cards, topology=Topology(links=links))


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Plan for a model of some form and size (a sparse file) on some hardware; keys of [language] as keywords."""

    def make(
        hardware: Hardware = CPU,
        servers: tuple[Server, ...] = (LLAMACPP, VLLM),
        form: str = "gguf",
        gib: float = 1,
        manifest: str = "",
        **settings: Any,
    ) -> Plan:
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        name = "model.gguf" if form == "gguf" else "model.safetensors"
        with (folder / name).open("wb") as file:
            file.truncate(int(gib * GIB))
        file = name if form == "gguf" else "."
        (folder / "language.toml").write_text(f'format = "{form}"\nfile = "{file}"\n{manifest}')
        found: Match = match(load_profiles([PROFILES]), hardware)
        return make_plan(LanguageSettings(model="m", **settings), Library([tmp_path]), servers, found, hardware)

    return make


def test_the_profiles_server_where_it_can(plan: Any) -> None:
    made = plan()
    assert made.server is LLAMACPP
    assert made.reasons == ["llamacpp: the profile's choice", "by llamacpp"]


def test_else_the_first_that_can(plan: Any) -> None:
    """The model's form decides, and what the machine has."""
    made = plan(form="huggingface")
    assert made.server is VLLM
    assert made.reasons[:2] == [
        "not llamacpp: it serves gguf, and the model is huggingface",
        "vllm: the first that can serve 'm' here",
    ]
    lacking = Server("llamacpp", lacks="no llama-server")
    other = Server("other")
    assert plan(servers=(lacking, other)).server is other


def test_where_none_can_each_is_told(plan: Any) -> None:
    lacking = Server("vllm", ("huggingface",), lacks="it needs an NVIDIA GPU")
    with pytest.raises(ModelError) as refused:
        plan(form="huggingface", servers=(LLAMACPP, lacking))
    assert "llamacpp: it serves gguf" in refused.value.message
    assert "vllm: it needs an NVIDIA GPU" in refused.value.message
    assert "millhand[language]" in refused.value.hint


def test_the_owners_server_or_none(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"server = 'llamcpp' is not known; did you mean 'llamacpp'\?"):
        plan(server="llamcpp")
    with pytest.raises(ModelError, match="vllm: it serves huggingface, and the model is gguf"):
        plan(server="vllm")
    assert plan(server="llamacpp").reasons[0] == "llamacpp: named by [language] server"


def test_a_model_that_embeds_needs_a_server_that_does(plan: Any) -> None:
    plain = Server("plain", abilities=frozenset({"chat"}))
    made = plan(servers=(plain, LLAMACPP), manifest="embeddings = true\n")
    assert made.server is LLAMACPP and made.head.embeddings
    with pytest.raises(ModelError, match="it does not embed"):
        plan(servers=(plain,), manifest="embeddings = true\n")


def test_values_come_from_config_then_profile_then_model(plan: Any) -> None:
    launch = plan().head
    assert (launch.context_tokens, launch.slots, launch.threads, launch.kv_bits) == (4096, 2, 4, 16)
    assert (launch.speculation, launch.accelerators, launch.reasoning) == ("none", (), False)
    launch = plan(context_tokens=1000, slots=3, threads=2, kv_bits=8, speculation="ngram").head
    assert (launch.context_tokens, launch.slots, launch.threads, launch.kv_bits) == (1000, 3, 2, 8)
    assert launch.speculation == "ngram"
    made = plan(context_tokens=9000, manifest="context_tokens = 2048\nreasoning = true\n")
    assert made.head.context_tokens == 2048 and made.head.reasoning
    assert "context: 2048 tokens, which the model was trained for, not 9000" in made.reasons


def test_replicas_on_the_cpu_share_its_cores(plan: Any) -> None:
    made = plan(replicas=2)
    assert [(launch.accelerators, launch.threads) for launch in made.launches] == [((), 2), ((), 2)]


def test_a_small_model_has_a_process_on_every_card(plan: Any) -> None:
    made = plan(node(4, "NV12"), form="huggingface", gib=15)
    assert [launch.accelerators for launch in made.launches] == [("GPU-0",), ("GPU-1",), ("GPU-2",), ("GPU-3",)]
    assert made.head.threads == 0
    assert len(plan(node(4, "NV12"), form="huggingface", replicas=2).launches) == 2


def test_a_large_model_is_spread_over_the_fewest_that_nvlink_joins(plan: Any) -> None:
    """Pairs by NVLink, the rest across sockets: a pair holds it, and two pairs are two processes."""
    made = plan(node(4, "pairs"), form="huggingface", gib=70)
    assert [launch.accelerators for launch in made.launches] == [("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")]
    assert "spread over 2 GPUs, the fewest that hold its 70.0 GiB of weights" in made.reasons


def test_what_nvlink_does_not_join_only_the_owner_spreads(plan: Any) -> None:
    made = plan(node(2, "SYS"), form="huggingface", gib=70)
    assert [len(launch.accelerators) for launch in made.launches] == [1, 1]
    assert any("it may not fit" in reason for reason in made.reasons)
    made = plan(node(2, "SYS"), form="huggingface", gib=70, tensor_parallel=2)
    assert [launch.accelerators for launch in made.launches] == [("GPU-0", "GPU-1")]
    assert any("joined by SYS, not NVLink" in reason for reason in made.reasons)


def test_more_than_the_node_has_is_refused(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"replicas = 3 with tensor_parallel = 2 need 6 GPUs .* has 4 GPUs"):
        plan(node(4, "NV12"), form="huggingface", replicas=3, tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel = 8 need 8 GPUs"):
        plan(node(4, "NV12"), form="huggingface", tensor_parallel=8)
    with pytest.raises(ConfigError, match="has no GPU"):
        plan(tensor_parallel=2)


def test_a_name_that_is_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="not a path"):
        LanguageSettings(model="../m")
