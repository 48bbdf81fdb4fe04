"""`millhand setup` as a technician, and as a machine that sets machines up, meets it."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from millhand.config import load_config
from millhand.errors import ConfigError
from millhand.setup import PASSWORD_NAME, Answers, draft, read_answers, write

MACHINES = """\
# The press.
[[assets]]
name = "press"
adapter = "file"
options = { path = "/var/lib/millhand/press.csv", time_column = "time" }
"""


def millhand(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "millhand", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "machines.toml").write_text(MACHINES)
    (folder / "secret").write_text("hunter2\n")
    path = folder / "answers.toml"
    path.write_text(
        'group = "plant-a"\nnode = "press-7"\nbroker = "mqtt://127.0.0.1:1"\nusername = "node"\n'
        'password_file = "secret"\nmachines = "machines.toml"\n'
    )
    return path


def test_one_file_becomes_a_configuration_that_the_agent_takes(answers: Path, tmp_path: Path) -> None:
    target = tmp_path / "etc/millhand.toml"
    run = millhand("-c", str(target), "setup", "--answers", str(answers), "--no-check")
    assert run.returncode == 0, run.stderr
    assert "Next: " in run.stdout
    assert "hunter2" not in run.stdout + target.read_text()
    config = load_config(target)
    assert (config.node.id, config.node.group, config.telemetry.username) == ("press-7", "plant-a", "node")
    assert config.telemetry.secret() == "hunter2"
    assert [asset.name for asset in config.assets] == ["press"]
    assert "# The press." in target.read_text(), "comments of the machines' file stay"
    for path in (target, target.parent / PASSWORD_NAME):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_second_run_changes_nothing_not_even_what_was_edited(answers: Path, tmp_path: Path) -> None:
    target = tmp_path / "etc/millhand.toml"
    words = ("-c", str(target), "setup", "--answers", str(answers), "--no-check")
    assert millhand(*words).returncode == 0
    target.write_text(target.read_text() + "\n[log]\nlevel = 'debug'\n")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.parent.iterdir()}
    run = millhand(*words)
    assert run.returncode == 0
    assert "Nothing changed" in run.stdout
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.parent.iterdir()} == before


def test_other_answers_replace_only_where_told_and_keep_what_was(answers: Path, tmp_path: Path) -> None:
    target = tmp_path / "millhand.toml"
    target.write_text("[node]\nid = 'mine'\n")
    made = draft(read_answers(answers), target)
    with pytest.raises(ConfigError, match="is there already") as caught:
        write(made, target)
    assert "--replace" in caught.value.hint
    assert target.read_text() == "[node]\nid = 'mine'\n"
    changed, kept = write(made, target, replace=True)
    assert changed
    assert kept == tmp_path / "millhand.toml.1"
    assert kept.read_text() == "[node]\nid = 'mine'\n"
    _, kept = write(draft(Answers(node="other"), target), target, replace=True)
    assert kept == tmp_path / "millhand.toml.2"


def test_answers_that_say_nothing_are_a_node_that_watches_itself(tmp_path: Path) -> None:
    text = draft(Answers(), tmp_path / "millhand.toml").text
    data = tomllib.loads(text)
    assert [asset["adapter"] for asset in data["assets"]] == ["host"]
    assert "telemetry" not in data


@pytest.mark.parametrize("name", ["förder band", "node_1.plant", "---", "a" * 64, "99", "x\u200by"])
def test_a_host_name_of_any_characters_gives_a_name_that_the_fleet_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    target = tmp_path / "millhand.toml"
    write(draft(Answers(), target), target)
    assert load_config(target, {}).node.id.isascii()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('brokr = "mqtt://x"', "did you mean 'broker'"),
        ('broker = "http://x"', "mqtt://host"),
        ('broker = "mqtt://user:pw@x"', "must not hold a user name or a password"),
        ('node = "press 7"', "'press 7'"),
        ('machines = "none.toml"', "does not exist"),
        ('username = "u"', "'broker' is empty"),
        ('broker = "mqtt://x"\nusername = "u"\npassword_file = "none"', "cannot be read"),
        ("broker", "not valid TOML"),
    ],
)
def test_a_wrong_answer_is_named_and_writes_nothing(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.toml"
    path.write_text(line)
    with pytest.raises(ConfigError) as caught:
        draft(read_answers(path), tmp_path / "millhand.toml")
    assert said in caught.value.message
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[node]\nid = 'x'\n", r"no \[\[assets\]\]"),
        (MACHINES + "[node]\nid = 'x'\n", "belongs not to a machine"),
        (MACHINES.replace("path =", "pth ="), "did you mean 'path'"),
        (MACHINES.replace('"file"', '"fiel"'), "fiel"),
    ],
)
def test_a_machines_file_that_the_agent_would_refuse_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "machines.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        draft(Answers(machines=str(path)), tmp_path / "millhand.toml")


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root, for a small file system")
@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_a_full_or_read_only_disk_leaves_the_configuration_as_it_was(
    options: str, answers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    target = folder / "millhand.toml"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=True)
    try:
        target.write_text("[node]\nid = 'mine'\n")
        if options == "ro":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        run = millhand("-c", str(target), "setup", "--answers", str(answers), "--replace", "--no-check")
        assert run.returncode == 1
        assert "cannot be written" in run.stderr
        assert "Traceback" not in run.stderr
        assert target.read_text() == "[node]\nid = 'mine'\n"
        assert not list(folder.glob(".*")), "no temporary file stays"
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_person_is_asked_and_the_password_is_not_shown(tmp_path: Path) -> None:
    target = tmp_path / "millhand.toml"
    said = _dialogue([str(target)], ["plant-b", "", "mqtt://127.0.0.1:1", "me", "hunter2", "none", ""])
    assert "hunter2" not in said
    config = load_config(target, {})
    assert (config.node.group, config.telemetry.username, config.assets) == ("plant-b", "me", ())
    assert config.telemetry.secret() == "hunter2"


def test_nobody_to_ask_is_said(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "millhand", "-c", str(tmp_path / "m.toml"), "setup"]
    run = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "--answers" in run.stderr


def _dialogue(paths: list[str], lines: list[str]) -> str:
    """Answer each prompt on a terminal as it appears; returns all that was shown."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "millhand", "-c", *paths, "setup", "--no-check"])
    shown, waiting = b"", list(lines)
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # EIO: the other end is closed
            break
        shown += part
        if waiting and shown.rstrip(b" ").endswith(b":"):
            os.write(terminal, f"{waiting.pop(0)}\n".encode())
            shown += b"\n"
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
    assert not waiting
    return shown.decode()
