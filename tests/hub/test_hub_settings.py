"""hub.toml: each fault is named with key and remedy; the environment wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from millhand.errors import ConfigError
from millhand_hub.settings import HubSettings, load_settings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("brokr = 'x'", "did you mean 'broker'"),
        ("broker = 'http://x'", "mqtt://host"),
        ("broker = 'mqtt://me:secret@x'", "user name or a password"),
        ("host_id = 'a b'", "host_id"),
        ("group = '#'", "group"),
        ("commit_ms = 0", "commit_ms"),
        ("protocol = '4'", "protocol"),
        ("cert_file = '/x'", "belong together"),
        ("password_env = 'A'\npassword_file = '/b'", "one of"),
        ("keep_days = 'long'", "keep_days"),
        ("keep_days = ", "TOML"),
    ],
)
def test_faults_are_named(tmp_path, text, told):
    path = tmp_path / "hub.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        load_settings(path, {})
    assert str(path) in caught.value.message and caught.value.hint


def test_defaults_and_environment(tmp_path):
    assert load_settings(None, {}) == HubSettings()
    (tmp_path / "hub.toml").write_text("keep_days = 5\nbroker = 'mqtt://a'\n")
    environment = {"MILLHAND_HUB__BROKER": "mqtts://b:1", "MILLHAND_HUB__COMMIT_MS": "7", "MILLHAND_HUB_CONFIG": "x"}
    settings = load_settings(tmp_path / "hub.toml", environment)
    assert (settings.broker, settings.commit_ms, settings.keep_days) == ("mqtts://b:1", 7, 5)
    with pytest.raises(ConfigError, match=r"'commit_ms' = 'soon': .* \(set by MILLHAND_HUB__COMMIT_MS\)"):
        load_settings(tmp_path / "hub.toml", {"MILLHAND_HUB__COMMIT_MS": "soon"})
    assert settings.database_path == Path("/var/lib/millhand-hub/hub.db")
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(tmp_path / "none.toml", {})
