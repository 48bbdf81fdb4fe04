"""A broken plugin is reported and left out, and never takes another with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from millhand import registry as registry_module
from millhand.errors import PluginError
from millhand.registry import Registry

GOOD = """
from millhand.hookspecs import hookimpl
from millhand.validation import StrictTable

class Options(StrictTable):
    depth: int = 3

@hookimpl
def millhand_config():
    return Options

@hookimpl
def millhand_models(config):
    from pathlib import Path
    return [Path(f"/models/{config.depth}")]
"""
RAISES_AT_IMPORT = "raise RuntimeError('no licence dongle')"
NEEDS_A_PACKAGE = "import a_package_that_is_not_here"
RAISES_IN_HOOK = """
from millhand.hookspecs import hookimpl

@hookimpl
def millhand_models(config):
    raise ValueError("bad table")
"""
UNKNOWN_HOOK = """
from millhand.hookspecs import hookimpl

@hookimpl
def millhand_modells(config):
    return []
"""
WRONG_SIGNATURE = """
from millhand.hookspecs import hookimpl

@hookimpl
def millhand_models(config, nonsense):
    return []
"""

Install = Callable[..., Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make plugins from source text, as installed packages would bring them."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**sources: str) -> Registry:
        points = {}
        for name, text in sources.items():
            module = f"plugin_under_test_{name}"
            (tmp_path / f"{module}.py").write_text(text)
            sys.modules.pop(module, None)
            points[name] = EntryPoint(name, module, "millhand")
        monkeypatch.setattr(registry_module, "_entry_points", lambda: points)
        return Registry()

    return make


def test_good_plugin_gets_its_validated_config(install: Install) -> None:
    registry = install(good=GOOD)
    registry.load({"good": {"depth": 5}})
    assert list(registry.collect("millhand_models")) == [("good", Path("/models/5"))]
    assert registry.plugins["good"].state == "loaded"


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (RAISES_AT_IMPORT, "no licence dongle", "author"),
        (NEEDS_A_PACKAGE, "a_package_that_is_not_here", "install the package"),
        (UNKNOWN_HOOK, "did you mean 'millhand_models'", "docs/plugins.md"),
        (WRONG_SIGNATURE, "nonsense", "author"),
    ],
)
def test_broken_plugin_is_reported_and_the_others_work(install: Install, source: str, message: str, hint: str) -> None:
    registry = install(good=GOOD, broken=source)
    registry.load({"broken": {}, "good": {}})
    broken = registry.plugins["broken"]
    assert broken.state == "failed"
    assert message in broken.error
    assert hint in broken.hint
    assert list(registry.collect("millhand_models")) == [("good", Path("/models/3"))]


def test_hook_that_raises_spoils_only_itself(install: Install) -> None:
    registry = install(raises=RAISES_IN_HOOK, good=GOOD)
    registry.load({"raises": {}, "good": {}})
    assert list(registry.collect("millhand_models")) == [("good", Path("/models/3"))]
    assert registry.plugins["raises"].state == "degraded"
    assert "bad table" in registry.plugins["raises"].error


def test_required_plugin_is_fatal(install: Install) -> None:
    registry = install(broken=RAISES_AT_IMPORT)
    with pytest.raises(PluginError, match=r"'broken' is required .* no licence dongle"):
        registry.load({"broken": {"required": True}})


def test_plugin_with_a_bad_table_names_the_key(install: Install) -> None:
    registry = install(good=GOOD)
    registry.load({"good": {"dept": 1}})
    assert registry.plugins["good"].error == "config [plugins.good]: key 'dept' is not known; did you mean 'depth'?"


def test_plugin_that_is_not_installed_gets_a_suggestion(install: Install) -> None:
    registry = install(good=GOOD)
    registry.load({"goood": {}})
    assert "did you mean 'good'" in registry.plugins["goood"].error


def test_disabled_plugin_is_not_imported(install: Install) -> None:
    registry = install(broken=RAISES_AT_IMPORT)
    registry.load({"broken": {"enabled": False}})
    assert registry.plugins["broken"].state == "disabled"
    assert "plugin_under_test_broken" not in sys.modules


def test_a_disabled_plugin_comes_up_once_it_is_enabled(install: Install) -> None:
    registry = install(good=GOOD)
    registry.load({"good": {"enabled": False}})
    assert registry.loaded() == []
    registry.load({"good": {"depth": 2}})
    registry.load({"good": {"depth": 3}})  # one that is loaded keeps what it was loaded with
    assert [(plugin.name, plugin.state, plugin.table) for plugin in registry.loaded()] == [
        ("good", "loaded", {"depth": 2})
    ]


def test_only_named_plugins_are_imported(install: Install) -> None:
    registry = install(good=GOOD, other=GOOD)
    registry.load({"good": {}})
    assert "plugin_under_test_other" not in sys.modules
    assert {plugin.name: plugin.state for plugin in registry.listing()} == {"good": "loaded", "other": "available"}


def test_failed_plugin_comes_up_when_it_is_mended(install: Install, tmp_path: Path) -> None:
    registry = install(broken=RAISES_AT_IMPORT)
    registry.load({"broken": {}})
    assert registry.retry_failed() == []
    (tmp_path / "plugin_under_test_broken.py").write_text(GOOD)
    assert registry.retry_failed() == ["broken"]
    assert list(registry.collect("millhand_models")) == [("broken", Path("/models/3"))]
