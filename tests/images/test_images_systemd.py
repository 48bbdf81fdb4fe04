"""The package's units under a real systemd: a Debian 12 booted in namespaces, as root. `make test-packages`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from booted_kit import Booted, missing
from package_kit import WITH_PYTHON, bare_root

from millhand.testing import wait_until
from millhand_images import deb
from millhand_images.target import Target

OLD, NEW = "0.1.0.dev1", "0.1.0.dev2"
INCLUDE = (*WITH_PYTHON, "systemd", "systemd-sysv", "dbus", "procps", "mosquitto")
AGENT, SETUP, HUB = "millhand.service", "millhand-setup.service", "millhand-hub.service"
CONFIG = "etc/millhand/millhand.toml"
ADDED = '\n[assets.options]\nevery_ms = 500\n\n[models]\nload = ["rig-fault"]\n\n[plugins.rig]\n'
ROW = ",".join(map(str, range(1, 45))) + "\n"
DEADLINE_S = 120.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> package: of the folder that TEST_PACKAGES names, else built."""
    if ready := os.environ.get("TEST_PACKAGES"):
        return {each: Path(ready) / f"millhand_{deb.debian_version(each)}_amd64.deb" for each in (OLD, NEW)}
    folder = tmp_path_factory.mktemp("packages")
    return {each: deb.build(Target("amd64", "3.11"), folder, each, quick=True) for each in (OLD, NEW)}


@pytest.fixture
def root(tmp_path: Path, packages: dict[str, Path]) -> Path:
    """A bare Debian with systemd, and the packages in /root."""
    made = tmp_path / "machine/root"
    bare_root("amd64", made, INCLUDE)
    for package in packages.values():
        shutil.copy(package, made / "root")
    return made


@pytest.fixture
def machine(root: Path) -> Iterator[Booted]:
    """The root, booted."""
    with Booted(root) as booted:
        yield booted


def wait(condition: Callable[[], object], what: str) -> None:
    """Every look is a process in the machine."""
    wait_until(condition, what, DEADLINE_S, every_s=0.5)


def install(machine: Booted, version: str) -> str:
    """What dpkg said."""
    return machine.run("dpkg", "-i", f"/root/millhand_{deb.debian_version(version)}_amd64.deb").stdout


def set_up(machine: Booted) -> None:
    """A node that watches itself and may serve a model."""
    (machine.root / "root/answers.toml").write_text('node = "press-7"\n')
    said = machine.run("millhand", "setup", "--answers", "/root/answers.toml").stdout
    assert "Next: `sudo systemctl start millhand`" in said
    with (machine.root / CONFIG).open("a") as file:
        file.write(ADDED)


def pid_of(machine: Booted) -> str:
    """Of the agent, in the machine; "0" while there is none."""
    return machine.unit(AGENT, "MainPID")


def predicts(machine: Booted) -> bool:
    """Whether the model answers."""
    done = machine.run("millhand", "predict", "rig-fault", "--format", "csv", text=ROW, check=False)
    return done.returncode == 0 and "It says: healthy" in done.stdout


def readings(machine: Booted) -> list[str]:
    """Lines of CSV, the agent's; none while none answers."""
    return machine.run("millhand", "readings", "node", check=False).stdout.splitlines()[1:]


def test_a_unit_from_install_to_purge(machine: Booted) -> None:
    """One life: each step begins where the one before ended."""
    install(machine, OLD)
    assert [machine.unit(unit, "UnitFileState") for unit in (AGENT, SETUP, HUB)] == ["enabled", "enabled", "disabled"]
    assert machine.unit(AGENT, "ConditionResult") == "no" and machine.unit(AGENT, "ActiveState") == "inactive"

    set_up(machine)
    machine.run("systemctl", "start", "millhand")  # returns when the agent has said that it is ready
    assert machine.unit(AGENT, "StatusText").startswith("profile generic-cpu, 1 assets")
    assert predicts(machine)
    _assert_confined(machine)

    before = pid_of(machine)
    machine.run("systemctl", "reload", "millhand")
    wait(lambda: "configuration read again" in machine.journal(AGENT), "the reload")
    assert pid_of(machine) == before

    wait(lambda: len(readings(machine)) > 2, "readings")
    kept = readings(machine)
    install(machine, NEW)
    wait(lambda: pid_of(machine) not in ("0", before), "the upgraded agent")
    wait(lambda: predicts(machine), "its prediction")
    assert machine.run("millhand", "--version").stdout.strip().endswith(NEW)
    assert set(kept) <= set(readings(machine)), "readings were lost"

    machine.run("systemctl", "stop", "millhand")
    assert (machine.unit(AGENT, "Result"), machine.unit(AGENT, "ActiveState")) == ("success", "inactive")
    assert "ready: profile" in machine.journal(AGENT, "--priority=info")
    assert machine.journal(AGENT, "--priority=warning") == ""
    machine.run("systemctl", "start", "millhand")
    machine.run("dpkg", "--purge", "millhand")
    assert machine.unit(AGENT, "LoadState") == "not-found"
    assert machine.run("pgrep", "-u", "millhand", check=False).returncode != 0
    assert not (machine.root / "var/lib/millhand").exists() and not (machine.root / "etc/millhand").exists()
    assert machine.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"


def test_an_agent_that_dies_or_hangs_is_started_again(machine: Booted) -> None:
    install(machine, NEW)
    set_up(machine)
    machine.run("systemctl", "start", "millhand")
    wait(lambda: len(readings(machine)) > 2, "readings")
    kept = readings(machine)
    for fatal, result in ((signal.SIGKILL, "signal"), (signal.SIGSTOP, "watchdog")):
        before = pid_of(machine)
        machine.run("kill", f"-{fatal.value}", before)
        wait(lambda before=before: pid_of(machine) not in ("0", before), f"an agent after {fatal.name}")
        wait(lambda: predicts(machine), "its prediction")
        said = machine.run("journalctl", "--no-pager", "--output=cat", f"--unit={AGENT}").stdout
        assert f"Failed with result '{result}'" in said
    assert machine.unit(AGENT, "NRestarts") == "2"
    worker = machine.run("pgrep", "-f", "millhand.serving.worker").stdout.split()[0]
    machine.run("kill", "-KILL", worker)
    wait(lambda: "it is started again" in machine.journal(AGENT, "--priority=err"), "word of the killed worker")
    wait(lambda: predicts(machine), "a prediction of the next worker")
    assert machine.unit(AGENT, "NRestarts") == "2", "the agent itself went on"
    assert set(kept) <= set(readings(machine)), "readings were lost"


def test_a_node_sets_itself_up_at_its_first_boot_and_starts_by_itself_at_the_next(root: Path) -> None:
    """Installed and answered beforehand, as on a cloned disk: nobody logs in."""
    with Booted(root) as factory:
        install(factory, NEW)
    (root / "etc/millhand/answers.toml").write_text('node = "press-7"\n')
    for boot in ("first", "second"):
        with Booted(root) as machine:
            wait(
                lambda machine=machine: machine.unit(AGENT, "ActiveState") == "active", f"the agent at the {boot} boot"
            )
            assert machine.unit(SETUP, "ConditionResult") == ("yes" if boot == "first" else "no")
            assert 'id = "press-7"' in (root / CONFIG).read_text()
            wait(lambda machine=machine: len(readings(machine)) > 1, "readings")


def test_the_hub_runs_in_its_own_confines(machine: Booted) -> None:
    install(machine, NEW)
    (machine.root / "etc/millhand/hub.toml").write_text("")
    machine.run("systemctl", "enable", "--now", "millhand-hub")
    wait(lambda: machine.run("millhand", "hub", "health", check=False).returncode == 0, "the hub")
    status = machine.run("cat", f"/proc/{machine.unit(HUB, 'MainPID')}/status").stdout
    assert "CapBnd:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    machine.run("systemctl", "stop", "millhand-hub")
    assert machine.unit(HUB, "Result") == "success"


def _assert_confined(machine: Booted) -> None:
    """What the kernel says of the running agent, not what the unit's file says."""
    pid = pid_of(machine)
    status = machine.run("cat", f"/proc/{pid}/status").stdout
    for fact in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert fact in status, status
    assert machine.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip() == "millhand"
    for folder in ("/etc", "/usr", "/home", "/root", "/opt"):
        done = machine.run("nsenter", f"--target={pid}", "--mount", "touch", f"{folder}/millhand-was-here", check=False)
        assert done.returncode != 0, f"the agent's namespace lets {folder} be written"
    enter = ("nsenter", f"--target={pid}", "--mount")
    assert machine.run(*enter, "ls", "-A", "/home", "/root").stdout.split() == ["/home:", "/root:"]
    assert machine.run(*enter, "sh", "-c", "echo millhand >/proc/sys/kernel/hostname", check=False).returncode != 0
