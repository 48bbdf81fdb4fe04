"""The plugin as the core meets it: through its entry point, configured by its own sample."""

import tomllib
from pathlib import Path

from millhand.registry import Registry
from millhand_plugins import turbofan
from millhand_plugins.turbofan.extractor import TurbofanExtractor

SAMPLE = Path(turbofan.__file__).parent / "sample.toml"


def test_the_sample_loads_extractor_and_model():
    registry = Registry()
    registry.load(tomllib.loads(SAMPLE.read_text())["plugins"])
    [(_, extractor)] = registry.collect("millhand_extractors")
    [(_, models)] = registry.collect("millhand_models")
    [state] = [plugin for plugin in registry.listing() if plugin.name == "turbofan"]
    assert (state.state, state.error) == ("loaded", "")
    assert isinstance(extractor, TurbofanExtractor)
    assert [path.parent.name for path in models.glob("*/model.toml")] == ["turbofan-rul"]
