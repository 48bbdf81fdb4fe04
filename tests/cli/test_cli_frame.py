"""The command line as a person meets it: help, mistakes, exit codes, JSON, speed."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.cli import COMMANDS, EXIT_CODES


def millhand(*words: str, config: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--config", str(config)] if config else []
    return subprocess.run(
        [sys.executable, "-m", "millhand", *options, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "millhand.toml"
    path.write_text(f"[node]\nid = 'n1'\ndata_dir = '{tmp_path}/data'\nrun_dir = '{tmp_path}/run'\n")
    return path


def test_help_lists_every_command_and_is_fast() -> None:
    durations = []
    for _ in range(5):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run = millhand("--help")
        durations.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin)
        assert run.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in run.stdout
    assert statistics.median(durations) <= 0.6, "the goal is 0.3 s on an idle machine; see benchmarks/footprint.py"


def test_help_imports_nothing_heavy() -> None:
    heavy = "('numpy', 'pydantic', 'onnxruntime', 'msgspec')"
    code = f"import sys, millhand.cli; print(*[name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    run = millhand(command, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: millhand " + command)


def test_unknown_command_gets_a_suggestion() -> None:
    run = millhand("chekc")
    assert run.returncode == EXIT_CODES["usage"]
    assert "did you mean 'check'" in run.stderr
    assert run.stderr.startswith("Error: ")
    assert "\nTry: " in run.stderr


def test_errors_fit_80_columns_and_show_no_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(
        "[node]\nid = 'x'\nprofil = 'a30'\n[log]\nlevel = 'deafening, and much more than that, for ever and ever'\n"
    )
    run = millhand(config=bad)
    assert run.returncode == EXIT_CODES["error"]
    assert "Traceback" not in run.stderr
    assert "did you mean 'profile'" in run.stderr.replace("\n       ", " ")
    words_too_long = max(len(word) for word in run.stderr.split())
    assert all(len(line) <= max(80, words_too_long + 7) for line in run.stderr.splitlines())


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    run = millhand("-v", config=tmp_path / "none.toml")
    assert "Traceback" in run.stderr


def test_state_without_a_daemon_says_so_and_the_next_step(config: Path) -> None:
    run = millhand(config=config)
    assert run.returncode == 0
    assert "not running" in run.stdout
    assert "Next step" in run.stdout


def test_json_state_is_one_document(config: Path) -> None:
    run = millhand("--json", config=config)
    assert json.loads(run.stdout)["running"] is False


def test_a_command_that_needs_the_daemon_names_the_remedy(config: Path) -> None:
    run = millhand("alert", "list", config=config)
    assert run.returncode == EXIT_CODES["error"]
    assert "no daemon answers" in run.stderr
    assert "millhand run" in run.stderr


def test_config_show_holds_every_section_and_hides_secrets(config: Path) -> None:
    run = millhand("config", "show", config=config, MILLHAND_TELEMETRY__PASSWORD="hunter2")
    assert run.returncode == 0, run.stderr
    assert "[node]" in run.stdout
    assert 'id = "n1"' in run.stdout
    assert "hunter2" not in run.stdout


def test_config_show_can_be_read_back(config: Path, tmp_path: Path) -> None:
    shown = millhand("config", "show", config=config)
    again = tmp_path / "again.toml"
    again.write_text(shown.stdout)
    run = millhand("config", "validate", config=again)
    assert run.returncode == 0, run.stderr + shown.stdout


def test_config_validate_checks_asset_options(config: Path) -> None:
    with config.open("a") as file:
        file.write('[[assets]]\nname = "a"\nadapter = "file"\noptions = { pth = "x.csv" }\n')
    run = millhand("config", "validate", config=config)
    assert run.returncode == EXIT_CODES["error"]
    assert "did you mean 'path'" in run.stderr.replace("\n       ", " ")


def test_config_validate_names_every_fault_of_plugins_and_assets(config: Path) -> None:
    with config.open("a") as file:
        file.write("[plugins.webhook]\n[plugins.nosuch]\n")
        for name in ("a", "b"):
            file.write(f'[[assets]]\nname = "{name}"\nadapter = "file"\noptions = {{ pth = "x.csv" }}\n')
    run = millhand("config", "validate", config=config)
    message = json.loads(millhand("config", "validate", "--json", config=config).stderr)["error"]["message"]
    assert run.returncode == EXIT_CODES["error"]
    for part in ("'nosuch' is not installed", "key 'url' is missing", "'a' options: key 'pth'", "'b' options: key"):
        assert part in message
    assert run.stderr.startswith("Error: plugin"), "the log does not say it before"


def test_config_schema_is_json_schema() -> None:
    run = millhand("config", "schema")
    assert json.loads(run.stdout)["properties"]["node"]


def test_check_reports_each_part_and_exits_with_the_level(config: Path) -> None:
    run = millhand("check", "--json", config=config)
    found = json.loads(run.stdout)
    names = {finding["name"] for finding in found["findings"]}
    assert {"config", "data_dir", "clock", "profile", "broker", "daemon"} <= names
    assert found["errors"] == 0
    assert run.returncode == EXIT_CODES["check_warnings"], "no broker and no daemon are warnings"


def test_check_of_a_bad_configuration_is_an_error(tmp_path: Path) -> None:
    run = millhand("check", config=tmp_path / "none.toml")
    assert run.returncode == EXIT_CODES["check_errors"]
    assert "does not exist" in run.stdout


def test_plugin_list_names_every_first_party_plugin(config: Path) -> None:
    run = millhand("plugin", "list", "--json", config=config)
    states = {plugin["name"]: plugin["state"] for plugin in json.loads(run.stdout)}
    assert states["boards"] == "loaded"
    assert states["modbus"] == "available"
    assert set(states) >= {"file", "host", "modbus", "onnxruntime", "orders", "rig", "turbofan", "webhook", "boards"}


def test_a_plugin_that_fails_is_shown_in_the_table_alone(config: Path) -> None:
    with config.open("a") as file:
        file.write("[plugins.webhook]\n")
    run = millhand("plugin", "list", config=config)
    assert (run.returncode, run.stderr) == (0, "")
    assert "webhook      failed" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert "key 'url' is missing" in millhand("plugin", "show", "webhook", config=config).stdout


def test_plugin_show_tells_the_options_of_any_installed_plugin(config: Path) -> None:
    webhook = millhand("plugin", "show", "webhook", config=config)
    assert "webhook (millhand" in webhook.stdout and "available" in webhook.stdout
    assert "  url: string, required" in webhook.stdout
    assert "millhand_sinks" in webhook.stdout
    modbus = millhand("plugin", "show", "modbus", config=config)
    assert "  registers[].address: integer, required" in modbus.stdout
    assert "  waveforms[].scale_register.address: integer, required" in modbus.stdout
    assert max(map(len, modbus.stdout.splitlines())) <= 80
    options = json.loads(millhand("plugin", "show", "modbus", "--json", config=config).stdout)["options"]
    keys = {key["name"]: key for key in options['[assets.options] of adapter "modbus"']}
    assert keys["poll_ms"]["default"] == "1000" and keys["poll_ms"]["meaning"]


def test_plugin_test_reads_the_host(config: Path) -> None:
    with config.open("a") as file:
        file.write('[[assets]]\nname = "node"\nadapter = "host"\n')
    run = millhand("plugin", "test", "host", config=config)
    assert run.returncode == 0, run.stderr
    assert "Plugin host works." in run.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    run = millhand("completion", shell)
    assert run.returncode == 0
    assert "_MILLHAND_COMPLETE" in run.stdout


def test_config_validate_checks_the_models(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models/chain"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(
        'name = "chain"\ndescription = "d"\nlicence = "MIT"\n[[inputs]]\nname = "x"\nshape = [-1]\n'
        '[[outputs]]\nname = "y"\nshape = [-1]\n[[steps]]\nmodel = "nosuch"\n'
    )
    with config.open("a") as file:
        file.write(f'[models]\npaths = ["{tmp_path}/models", "/nowhere"]\n')
    run = millhand("config", "validate", config=config)
    assert run.returncode == EXIT_CODES["error"]
    assert "step 1 (nosuch): model 'nosuch' is not known" in run.stderr.replace("\n       ", " ")
    (folder / "model.toml").unlink()
    assert millhand("config", "validate", config=config).returncode == 0, "a root may be there on another machine"
