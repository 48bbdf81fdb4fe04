"""The table [telemetry]: each fault is named with key and remedy."""

from __future__ import annotations

import pytest

from millhand.errors import ConfigError
from millhand.telemetry.settings import TelemetrySettings
from millhand.validation import validate

BROKER = {"enabled": True, "brokers": ("mqtt://broker:1883",)}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"enabled": True}, "brokers is empty"),
        ({"enabled": True, "brokers": ["http://broker"]}, "mqtt://host"),
        ({"enabled": True, "brokers": ["mqtt://"]}, "mqtt://host"),
        ({"enabled": True, "brokers": ["mqtt://broker:99999"]}, "[Pp]ort"),
        ({"enabled": True, "brokers": ["mqtt://me:secret@broker"]}, "user name or a password"),
        ({**BROKER, "delivery": "session"}, "primary_host"),
        ({**BROKER, "delivery": "sesion"}, "delivery"),
        ({**BROKER, "primary_host": "my host"}, "primary_host"),
        ({**BROKER, "password": "a", "password_env": "B"}, "one of password"),
        ({**BROKER, "cert_file": "/x"}, "belong together"),
        ({**BROKER, "protocol": "4"}, "protocol"),
        ({**BROKER, "keepalive": 5}, "did you mean 'keepalive_s'"),
        ({**BROKER, "in_flight_rows": 0}, "in_flight_rows"),
    ],
)
def test_faults_are_named(table, told):
    with pytest.raises(ConfigError, match=told) as caught:
        validate(TelemetrySettings, table, "millhand.toml [telemetry]")
    assert caught.value.hint


def test_the_password_comes_from_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("from the file\nsecond line\n")
    monkeypatch.setenv("BROKER_PASSWORD", "from the environment")
    assert TelemetrySettings(password="plain").secret() == "plain"
    assert TelemetrySettings(password_file=tmp_path / "secret").secret() == "from the file"
    assert TelemetrySettings(password_env="BROKER_PASSWORD").secret() == "from the environment"
    assert "plain" not in repr(TelemetrySettings(password="plain"))
    for settings in (TelemetrySettings(password_env="NOT_SET"), TelemetrySettings(password_file=tmp_path / "none")):
        with pytest.raises(ConfigError, match="password_") as caught:
            settings.secret()
        assert caught.value.hint


async def test_certificates_that_cannot_be_read_are_told(kit, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, "mqtts://127.0.0.1:1", ca_file=tmp_path / "ca.pem") as publisher,
    ):

        async def told():
            return "ca_file" in (await publisher.status())["error"]

        await kit.until(told, "the word of the certificate")
