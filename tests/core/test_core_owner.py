"""A data folder that belongs to the agent's user: root does not write into it, and what root left there is told."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.diagnosis import diagnose
from millhand.owner import handed_over, other_owner, start_command, strays

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
USER = pwd.getpwnam("nobody")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, USER.pw_uid, USER.pw_gid)
    return folder


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "millhand.toml"
    path.write_text(
        f'[node]\ndata_dir = "{data}"\nrun_dir = "{tmp_path / "run"}"\n[http]\nport = 0\n[telemetry]\nenabled = false\n'
    )
    return path


def test_root_does_not_run_the_agent_in_a_folder_of_another_user(config: Path, data: Path) -> None:
    command = [sys.executable, "-m", "millhand", "-c", os.fspath(config), "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "belongs to 'nobody'" in done.stderr
    assert "runuser -u nobody -- millhand run" in done.stderr
    assert list(data.iterdir()) == []


def test_the_next_step_names_the_user(config: Path, data: Path) -> None:
    assert start_command(data) == "runuser -u nobody -- millhand run"
    command = [sys.executable, "-m", "millhand", "-c", os.fspath(config)]
    config.write_text(config.read_text() + '[models]\nload = ["rig-fault"]\n')
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Next step  runuser -u nobody -- millhand run" in done.stdout


def test_a_folder_of_roots_own_or_of_nobody_known_is_run_in(tmp_path: Path) -> None:
    assert (other_owner(tmp_path), start_command(tmp_path / "none")) == ("", "millhand run")
    unknown = max(user.pw_uid for user in pwd.getpwall() if user.pw_uid < 60_000) + 1
    os.chown(tmp_path, unknown, unknown)
    assert other_owner(tmp_path) == ""


def test_what_root_left_behind_is_told_with_the_command_that_mends_it(config: Path, data: Path) -> None:
    (data / "models").mkdir()
    (data / "lost+found").mkdir()
    assert strays(data) == ["models"] and strays(data / "none") == []
    (finding,) = [finding for finding in diagnose(config) if finding.name == "data_dir"]
    assert finding.level == "warning" and "models" in finding.message
    assert f"chown -R {USER.pw_uid}:{USER.pw_gid} '{data}'" in finding.hint


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_what_root_makes_is_handed_over(data: Path, tmp_path: Path, fails: bool, linked: bool) -> None:
    if linked:
        data.rename(tmp_path / "disk")
        data.symlink_to(tmp_path / "disk")
    (data / "lost+found").mkdir()
    (data / "theirs").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    with contextlib.suppress(ValueError), handed_over(data, tmp_path / "none"):
        (data / "model/1").mkdir(parents=True)
        (data / "model/1/weights").write_text("")
        (data / "link").symlink_to(elsewhere)
        os.link(elsewhere, data / "second-name")
        if fails:
            raise ValueError
    made = [data / "theirs", data / "model", data / "model/1", data / "model/1/weights", data / "link"]
    assert {path: path.lstat().st_uid for path in made} == dict.fromkeys(made, USER.pw_uid)
    assert elsewhere.stat().st_uid == 0, "neither through a link nor by a second name"
    assert (data / "lost+found").stat().st_uid == 0


def test_a_command_of_roots_that_writes_leaves_nothing_of_roots(config: Path, data: Path) -> None:
    config.write_text(config.read_text() + "[plugins.rig]\n")
    command = [sys.executable, "-m", "millhand", "-c", os.fspath(config), "model", "prove", "rig-fault"]
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    left = {path.relative_to(data): path.lstat().st_uid for path in data.rglob("*")}
    assert len(left) > 2 and set(left.values()) == {USER.pw_uid}


def test_a_token_that_root_makes_can_be_read_by_the_agents_group(config: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.mkdir(mode=0o750)
    os.chown(settings, 0, USER.pw_gid)
    config.write_text(config.read_text() + f'[gateway]\ntokens_file = "{settings / "tokens"}"\n')
    command = [sys.executable, "-m", "millhand", "-c", os.fspath(config), "gateway", "token", "panel-3"]
    subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = (settings / "tokens").stat()
    assert (found.st_uid, found.st_gid, oct(found.st_mode & 0o777)) == (0, USER.pw_gid, "0o640")
