"""The owner's configuration: what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from millhand.config import Config, load_config
from millhand.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "millhand.toml"
    path.write_text(text)
    return path


def test_defaults_hold_without_a_file() -> None:
    config = load_config(None, {})
    assert config.node.group == "millhand"
    assert config.http.host == "127.0.0.1", "everything listens on loopback until configured"
    assert not config.telemetry.enabled


def test_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, "[node]\nidd = 'x'\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert caught.value.message == f"config '{path}': key 'node.idd' is not known; did you mean 'id'?"
    assert caught.value.hint


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[node]\nid = 'a b'\n[log]\nlevel = 'loud'\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert "key 'node.id' = 'a b'" in caught.value.message
    assert "key 'log.level' = 'loud'" in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[models]\nmemory_bytes_cap = '1GB'", "give a whole number without a unit, such as 1_000_000"),
        ("[models]\nhang_ms = '10s'", "give a number without a unit, such as 2.5"),
        ("[http]\nport = 80.5", "give a whole number, such as 1_000_000"),
        ("[http]\nenabled = 'maybe'", "give true or false"),
        ("[tracing]\nendpoint = 'collector:4318'", "such as http://127.0.0.1:4318/v1/traces"),
        ("[tracing]\nendpoint = 'http://collector:4318'", "give the whole URL, with its path"),
    ],
)
def test_a_wrong_value_is_told_how_it_would_be_right(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text + "\n"), {})
    assert says in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "[node\n",
        "node = [1\n",
        "[node]\nid = 'a'\nid = 'b'\n",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_malformed_toml_names_file_and_place(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(path) in caught.value.message


def test_missing_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.toml", {})
    assert "does not exist" in caught.value.message


def test_environment_overlays_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[node]\nid = 'a'\n")
    environment = {"MILLHAND_NODE__ID": "press-7", "MILLHAND_HTTP__PORT": "9001", "MILLHAND_HTTP__ENABLED": "false"}
    config = load_config(path, {**environment, "MILLHAND_HUB__BROKER": "mqtt://a"})
    assert (config.node.id, config.http.port, config.http.enabled) == ("press-7", 9001, False)


def test_a_fault_from_the_environment_names_key_and_variable(tmp_path: Path) -> None:
    path = write(tmp_path, "[node]\nidd = 'x'\n")
    environment = {"MILLHAND_HTTP__PORT": "lots", "MILLHAND_TELEMETRY__ENABLED": "true", "MODEL_PATH": "/two"}
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment)
    lines = caught.value.message.splitlines()
    assert any("'http.port' = 'lots'" in line and line.endswith("(set by MILLHAND_HTTP__PORT)") for line in lines)
    assert any("'telemetry'" in line and line.endswith("(set by MILLHAND_TELEMETRY__ENABLED)") for line in lines)
    assert any("'node.idd'" in line and "set by" not in line for line in lines), "this one is the file's"


def test_a_secret_is_not_shown_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"MILLHAND_TELEMETRY__PASSWORD": "4711"})
    assert "4711" not in caught.value.message
    assert "'telemetry.password' = (not shown)" in caught.value.message


def test_a_variable_reaches_into_tables_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "[[assets]]\nname = 'press'\nadapter = 'host'\n")
    with pytest.raises(ConfigError, match=r"'MILLHAND_ASSETS__PRESS__NAME': key 'assets' is no table"):
        load_config(path, {"MILLHAND_ASSETS__PRESS__NAME": "x"})


def test_environment_variable_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="MILLHAND_NODE"):
        load_config(None, {"MILLHAND_NODE": "x"})


def test_model_path_adds_folders(tmp_path: Path) -> None:
    path = write(tmp_path, "[models]\npaths = ['/one']\n")
    config = load_config(path, {"MODEL_PATH": "/two:/three"})
    assert [str(folder) for folder in config.models.paths] == ["/one", "/two", "/three"]


def test_two_assets_of_one_name_are_refused(tmp_path: Path) -> None:
    asset = "[[assets]]\nname = 'press'\nadapter = 'host'\n"
    with pytest.raises(ConfigError, match="two assets are called 'press'"):
        load_config(write(tmp_path, asset + asset), {})


def test_plugins_to_load_are_those_named_and_those_that_adapters_name(tmp_path: Path) -> None:
    path = write(tmp_path, "[plugins.rig]\n[[assets]]\nname = 'press'\nadapter = 'modbus'\n")
    names = list(load_config(path, {}).plugin_tables())
    assert names == ["boards", "onnxruntime", "orders", "modbus", "rig"]


def test_schema_describes_every_section() -> None:
    properties = Config.model_json_schema()["properties"]
    assert {"node", "log", "store", "telemetry", "models", "http", "grpc", "orders", "plugins", "assets"} <= set(
        properties
    )
