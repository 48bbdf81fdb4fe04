"""The shipped profiles, their match, and what an owner's own folder may do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import millhand_profiles
from millhand.errors import ConfigError
from millhand.hardware import Accelerator, Cpu, Hardware, Jetson, Memory, MigInstance, Topology
from millhand.profiles import Match, Profile, load_profiles, match, profile_named
from millhand.serving.settings import WorkerDefaults

GIB = 1 << 30
FOLDER = Path(millhand_profiles.__file__).parent
SHIPPED = load_profiles([FOLDER])
NAMES = {
    "jetson-agx-orin-64gb", "jetson-agx-orin-32gb", "a30", "a30-mig", "a100-40gb", "a100-80gb", "a100-80gb-x8", "h100",
    "generic-jetson", "generic-nvidia", "generic-cpu",
}  # fmt: skip


def gpus(name: str, gib: float | None, capability: str, count: int = 1, **facts: Any) -> Hardware:
    size = None if gib is None else int(gib * GIB)
    cards = [
        Accelerator(index=i, name=name, uuid=f"GPU-{i}", memory_bytes=size, compute_capability=capability, ready=True)
        for i in range(count)
    ]
    return Hardware(accelerators=tuple(cards), **facts)


def jetson(module: str, jetpack: str = "6.2", **facts: Any) -> Hardware:
    board = Accelerator(index=0, name="Jetson", unified_memory=True, ready=True)
    return Hardware(jetson=Jetson(module=module, jetpack=jetpack), accelerators=(board,), **facts)


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder


MINIMAL = 'description = "mine"\nprecisions = ["fp32"]\nbackends = ["onnxruntime"]\n[match]\npriority = 35\n'


# ---- the shipped files ----------------------------------------------------------------------------------------------


def test_every_board_is_shipped() -> None:
    assert {profile.name for profile in SHIPPED} == NAMES
    assert list(millhand_profiles.millhand_profiles()) == [FOLDER]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_each_value_has_its_reason(path: Path) -> None:
    """A comment that says why stands right above each value."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        key = line.partition(" = ")[0]
        if " = " not in line or line.startswith("#") or key in ("description", "extends"):
            continue
        assert lines[number - 1].startswith("#"), f"{path.name}:{number + 1}: '{key}' has no reason"


@pytest.mark.parametrize("profile", SHIPPED, ids=lambda profile: profile.name)
def test_values_are_sane(profile: Profile) -> None:
    assert profile.description
    assert "fp32" in profile.precisions
    assert profile.backends[-1] == "onnxruntime", "the last resort must run anywhere"
    assert profile.worker.threads == "auto" or profile.worker.threads >= 1
    assert profile.memory.unified == ("jetson" in profile.name)
    assert (profile.worker.isolation == "shared") == (profile.name == "generic-cpu")


def test_roofline_of_the_boards() -> None:
    """Bandwidth over weights: 1.5B parameters (3.09 GB) in half precision."""
    named = {profile.name: profile for profile in SHIPPED}
    weights = int(1.545e9 * 2)
    rates = {name: named[name].tokens_per_s(weights) for name in ("jetson-agx-orin-64gb", "a30", "a100-80gb")}
    assert rates == {
        "jetson-agx-orin-64gb": pytest.approx(66, rel=0.01),
        "a30": pytest.approx(302, rel=0.01),
        "a100-80gb": pytest.approx(661, rel=0.01),
    }
    assert named["generic-cpu"].tokens_per_s(weights) is None


# ---- which board takes which profile --------------------------------------------------------------------------------

BOARDS: list[tuple[Hardware, str]] = [
    (Hardware(), "generic-cpu"),
    (jetson("Jetson AGX Orin 64GB"), "jetson-agx-orin-64gb"),
    (jetson("Jetson AGX Orin Industrial 64GB"), "jetson-agx-orin-64gb"),
    (jetson("Jetson AGX Orin 32GB"), "jetson-agx-orin-32gb"),
    (jetson("Jetson Orin Nano 8GB"), "generic-jetson"),
    (jetson("Jetson Orin NX 16GB"), "generic-jetson"),
    (jetson("Jetson AGX Xavier 32GB", "5.1.2"), "generic-jetson"),
    (jetson("Jetson AGX Thor 128GB", "7.0"), "generic-jetson"),
    (jetson(""), "generic-jetson"),
    (gpus("NVIDIA A30", 24, "8.0"), "a30"),
    (gpus("NVIDIA A30", 24, "8.0", 4), "a30"),
    (gpus("NVIDIA A100-PCIE-40GB", 39.4, "8.0"), "a100-40gb"),
    (gpus("A100-SXM4-40GB", 39.6, "8.0", 8), "a100-40gb"),
    (gpus("NVIDIA A100 80GB PCIe", 79.2, "8.0"), "a100-80gb"),
    (gpus("NVIDIA A100-SXM4-80GB", 80, "8.0", 4), "a100-80gb"),
    (gpus("NVIDIA A100-SXM4-80GB", 80, "8.0", 8), "a100-80gb-x8"),
    (gpus("NVIDIA A100-SXM4-80GB", None, "8.0", 8), "a100-80gb-x8"),
    (gpus("NVIDIA H100 80GB HBM3", 79.6, "9.0"), "h100"),
    (gpus("NVIDIA H100 PCIe", 79.6, "9.0"), "h100"),
    (gpus("NVIDIA H200", 140, "9.0", 8), "h100"),
    (gpus("NVIDIA A10", 22.5, "8.6"), "generic-nvidia"),
    (gpus("NVIDIA A3000", 22.5, "8.6"), "generic-nvidia"),
    (gpus("NVIDIA L40S", 45, "8.9"), "generic-nvidia"),
    (gpus("Tesla T4", 15, "7.5"), "generic-nvidia"),
    (gpus("NVIDIA GeForce RTX 4090", 24, "8.9", 8), "generic-nvidia"),
    (gpus("NVIDIA B200", 180, "10.0", 8), "generic-nvidia"),
    (gpus("", None, "", 8), "generic-nvidia"),
    (gpus("Tesla V100-SXM2-16GB", 16, "7.0"), "generic-cpu"),
    (gpus("Quadro P400", 2, "6.1"), "generic-cpu"),
    (Hardware(accelerators=(Accelerator(index=0, name="NVIDIA A30"),)), "generic-cpu"),
]


@pytest.mark.parametrize(("hardware", "name"), BOARDS, ids=lambda item: item if isinstance(item, str) else "")
def test_board_takes_profile(hardware: Hardware, name: str) -> None:
    found = match(SHIPPED, hardware)
    assert found.profile.name == name
    assert found.reasons[0].startswith(f"{name}: ")


def sliced() -> Hardware:
    node = gpus("NVIDIA A30", 24, "8.0")
    parts = tuple(MigInstance(index=i, uuid=f"MIG-{i}", profile="1g.6gb", memory_bytes=6 * GIB) for i in range(4))
    card = node.accelerators[0]
    facts = {name: getattr(card, name) for name in card.__struct_fields__}
    return Hardware(accelerators=(Accelerator(**{**facts, "mig_enabled": True, "mig": parts}),))


def test_mig_slices_get_a_worker_each() -> None:
    found = match(SHIPPED, sliced())
    assert found.profile.name == "a30-mig"
    assert [worker.accelerator for worker in found.workers] == ["MIG-0", "MIG-1", "MIG-2", "MIG-3"]
    budget = found.profile.budget_bytes(sliced(), sliced().accelerators[0].mig[0])
    assert budget is not None
    assert 4 * GIB < budget < 6 * GIB


def test_slices_without_uuid_are_said_to_be_unusable() -> None:
    card = Accelerator(index=0, name="NVIDIA A30", mig_enabled=True, mig=(MigInstance(gpu_instance=3),), ready=True)
    found = match(SHIPPED, Hardware(accelerators=(card,)))
    assert [worker.accelerator for worker in found.workers] == ["cpu"]
    assert any("UUIDs of its MIG slices are not known" in reason for reason in found.reasons)


def test_reasons_say_why_and_why_not() -> None:
    four = match(SHIPPED, gpus("NVIDIA A100-SXM4-80GB", 80, "8.0", 4)).reasons
    assert "not a100-80gb-x8: 4 GPUs found, not 8" in four
    assert "not a100-40gb: GPU memory is 80 GiB, not 35 to 45 GiB" in four
    assert "not generic-nvidia: it matches too, but a100-80gb has the higher priority" in four
    assert not any("h100" in reason or "jetson" in reason for reason in four), "other hardware is no news"
    old = match(SHIPPED, gpus("Quadro P400", 2, "6.1")).reasons
    assert "not generic-nvidia: compute capability 6.1 is below 7.5" in old
    assert "not generic-nvidia: no GPU with a driver was found" in match(SHIPPED, Hardware()).reasons


def test_mixed_cards_fall_to_the_generic_profile() -> None:
    mixed = (*gpus("NVIDIA A30", 24, "8.0").accelerators, *gpus("Tesla T4", 15, "7.5").accelerators)
    found = match(SHIPPED, Hardware(accelerators=mixed))
    assert found.profile.name == "generic-nvidia"


# ---- what the node adds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jetpack", "interpreter"),
    [("6.2.1", Path("/usr/bin/python3.10")), ("7.2", Path("/usr/bin/python3.12")), ("5.1.2", None), ("", None)],
)
def test_interpreter_follows_the_jetpack(jetpack: str, interpreter: Path | None) -> None:
    found = match(SHIPPED, jetson("Jetson AGX Orin 64GB", jetpack))
    assert found.worker.interpreter == interpreter
    assert any("the agent's own Python" in reason for reason in found.reasons) == (interpreter is None)


def test_a_missing_interpreter_is_left_out_on_a_live_node() -> None:
    found = match(SHIPPED, jetson("Jetson AGX Orin 64GB", "6.2", source="live"))
    if not Path("/usr/bin/python3.10").exists():
        assert found.worker.interpreter is None
        assert any("/usr/bin/python3.10 is not installed" in reason for reason in found.reasons)


def test_unified_memory_is_budgeted_from_what_is_available() -> None:
    node = jetson("Jetson AGX Orin 64GB", memory=Memory(total_bytes=61 * GIB, available_bytes=40 * GIB))
    profile = match(SHIPPED, node).profile
    assert profile.budget_bytes(node, node.accelerators[0]) == int(40 * GIB * 0.75) - 4 * GIB
    tight = jetson("Jetson AGX Orin 64GB", memory=Memory(available_bytes=40 * GIB, limit_bytes=8 * GIB))
    assert profile.budget_bytes(tight, tight.accelerators[0]) == 2 * GIB
    assert profile.budget_bytes(jetson("x"), node.accelerators[0]) is None


def test_discrete_memory_is_budgeted_from_the_card() -> None:
    node = gpus("NVIDIA A30", 24, "8.0", memory=Memory(available_bytes=1 * GIB))
    assert match(SHIPPED, node).profile.budget_bytes(node, node.accelerators[0]) == int(24 * GIB * 0.9) - GIB // 2


def test_tensor_parallel_needs_nvlink() -> None:
    full = tuple(tuple("X" if i == j else "NV12" for j in range(8)) for i in range(8))
    pcie = tuple(tuple("X" if i == j else "SYS" for j in range(8)) for i in range(8))

    def found(links: tuple[tuple[str, ...], ...]) -> Match:
        return match(SHIPPED, gpus("NVIDIA A100-SXM4-80GB", 80, "8.0", 8, topology=Topology(links=links)))

    assert found(full).tensor_parallel == 8
    assert found(pcie).tensor_parallel == 1
    assert any(reason.startswith("NVLink does not join the GPUs") for reason in found(pcie).reasons)
    assert any(reason.startswith("the NVLink topology is not known") for reason in found(()).reasons)
    pairs = tuple(tuple("X" if i == j else "NV4" if i // 2 == j // 2 else "SYS" for j in range(8)) for i in range(8))
    assert found(pairs).tensor_parallel == 2


def test_workers_are_pinned_near_their_gpu() -> None:
    topology = Topology(cpu_affinity=("0-1,4", "2-3"))
    found = match(SHIPPED, gpus("NVIDIA A30", 24, "8.0", 2, topology=topology))
    assert [worker.cpus for worker in found.workers] == [(0, 1, 4), (2, 3)]
    assert [worker.accelerator for worker in found.workers] == ["GPU-0", "GPU-1"]


def test_threads_never_exceed_what_the_process_may_use(tmp_path: Path) -> None:
    profiles = load_profiles([write(tmp_path, "mine", MINIMAL + "[worker]\nthreads = 16\n")])
    assert match(profiles, Hardware(cpu=Cpu(usable=1.5))).worker.threads == 1
    assert match(profiles, Hardware(cpu=Cpu(usable=8))).worker.threads == 8


def test_profile_stands_in_for_worker_defaults() -> None:
    assert all(isinstance(profile.worker, WorkerDefaults) for profile in SHIPPED)
    assert type(match(SHIPPED, Hardware()).worker) is WorkerDefaults


@pytest.mark.parametrize(("heat_c", "words"), [(79.9, ""), (80, "warn from 80 C on"), (89, "from 89 C on")])
def test_heat_is_judged_by_the_profile(heat_c: float, words: str) -> None:
    card = Accelerator(index=0, name="NVIDIA A30", temperature_c=heat_c, ready=True)
    problems = profile_named(SHIPPED, "a30").profile.limits.problems(Hardware(accelerators=(card,)))
    assert [words in problem.message for problem in problems] == ([True] if words else [])
    assert all(problem.hint for problem in problems)


def test_heat_of_a_jetson_is_its_junction() -> None:
    node = Hardware(jetson=Jetson(temperatures_c={"pmic": 100, "tj": 86}))
    problems = profile_named(SHIPPED, "jetson-agx-orin-64gb").profile.limits.problems(node)
    assert [(problem.field, problem.message) for problem in problems] == [("jetson", "86 C: warn from 85 C on")]


# ---- an owner's folder ----------------------------------------------------------------------------------------------


def test_owner_adds_a_profile(tmp_path: Path) -> None:
    text = MINIMAL.replace("priority = 35", "priority = 35\naccelerator = 'L40S'")
    profiles = load_profiles([FOLDER, write(tmp_path, "l40s", text)])
    assert match(profiles, gpus("NVIDIA L40S", 45, "8.9")).profile.name == "l40s"
    assert match(profiles, gpus("NVIDIA A30", 24, "8.0")).profile.name == "a30"


def test_owner_changes_one_value_of_a_shipped_profile(tmp_path: Path) -> None:
    profiles = load_profiles([FOLDER, write(tmp_path, "a30", 'extends = "a30"\n[worker]\nmax_batch = 8\n')])
    shipped = profile_named(SHIPPED, "a30").profile
    mine = profile_named(profiles, "a30").profile
    assert mine.worker.max_batch == 8
    assert mine.language == shipped.language
    assert len(profiles) == len(SHIPPED)
    # What extends it takes the owner's value too.
    assert profile_named(profiles, "a30-mig").profile.limits == shipped.limits


def test_owner_replaces_a_shipped_profile(tmp_path: Path) -> None:
    profiles = load_profiles([FOLDER, write(tmp_path, "generic-cpu", MINIMAL.replace("35", "0"))])
    assert match(profiles, Hardware()).profile.description == "mine"


BROKEN = [
    ("[worker]\nmax_bach = 8\n", "profile 'bad.toml': key 'worker.max_bach' is not known; did you mean 'max_batch'?"),
    ("[language]\nprecision = 'int3'\n", "profile 'bad.toml': key 'language.precision' = 'int3'"),
    ("[memory]\nfraction = 1.5\n", "profile 'bad.toml': key 'memory.fraction' = 1.5"),
    ("[limits]\nwarn_c = 90\nslowdown_c = 80\n", "warn_c = 90 must be below slowdown_c = 80"),
    ("[worker]\nisolation = 'slice'\n", "profile 'bad.toml': key 'worker.isolation' = 'slice'"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_profile_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_profiles([write(tmp_path, "bad", MINIMAL + text)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bach = 8\n" + MINIMAL, "key 'max_bach' is not known"),
        (MINIMAL.replace("priority = 35", "priority = 35\naccelerator = '('"), "is no regular expression"),
        (MINIMAL.replace("priority = 35", ""), "key 'match.priority' is missing"),
        ('extends = "a3O"\n' + MINIMAL, "key 'extends' = 'a3O' names no other profile; did you mean 'a30'?"),
        ('extends = "bad"\n' + MINIMAL, "key 'extends' = 'bad' names no other profile"),
        ("description = \n", "is not valid TOML"),
    ],
)
def test_broken_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_profiles([FOLDER, write(tmp_path, "bad", text)])
    assert "bad.toml" in caught.value.message
    assert caught.value.hint


def test_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", 'extends = "two"\n' + MINIMAL)
    write(tmp_path, "two", 'extends = "one"\n' + MINIMAL)
    with pytest.raises(ConfigError, match="goes in a circle"):
        load_profiles([tmp_path])


def test_fault_in_the_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base", MINIMAL + "[worker]\nmax_bach = 1\n")
    write(tmp_path, "top", 'extends = "base"\n[match]\npriority = 36\n')
    with pytest.raises(ConfigError, match=re.escape("profile 'base.toml': key 'worker.max_bach'")):
        load_profiles([tmp_path])


def test_tie_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", MINIMAL)
    write(tmp_path, "two", MINIMAL)
    with pytest.raises(ConfigError, match="profiles 'one' and 'two' both match with priority 35") as caught:
        match(load_profiles([tmp_path]), Hardware())
    assert "priority" in caught.value.hint


def test_no_match_and_no_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no profile matches"):
        match([], Hardware())
    with pytest.raises(ConfigError, match="does not exist"):
        load_profiles([tmp_path / "none"])


def test_named_profile() -> None:
    found = profile_named(SHIPPED, "a30", gpus("NVIDIA A30", 24, "8.0"))
    assert (found.profile.name, found.worker.accelerator) == ("a30", "GPU-0")
    assert found.reasons[0] == "a30: named by the configuration"
    with pytest.raises(ConfigError, match=r"profile 'a3O' is not known; did you mean 'a30'\?"):
        profile_named(SHIPPED, "a3O")


def test_slice_of_unknown_memory_is_budgeted_by_its_name() -> None:
    part = MigInstance(uuid="MIG-1", profile="2g.12gb")
    profile = profile_named(SHIPPED, "a30-mig").profile
    assert profile.budget_bytes(sliced(), part) == int(12 * GIB * 0.9) - profile.memory.reserve_bytes
