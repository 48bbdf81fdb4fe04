"""docs/models.md against the tables that read model.toml, and its example through them and the pipeline's parts."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from millhand.config import Config
from millhand.pipeline.features import builtin_extractors
from millhand.pipeline.rules import RuleEngine
from millhand.pipeline.windows import WindowBuilder
from millhand.records import Batch, Clock, Reading
from millhand.serving.manifest import FeatureSpec, Manifest, OutputSpec, RuleSpec, StepSpec, TensorSpec, WindowSpec
from millhand.serving.transforms import TRANSFORMS
from millhand.validation import validate

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": Manifest,
    "[[inputs]] and [[outputs]]": TensorSpec,
    "[window]": WindowSpec,
    "[features]": FeatureSpec,
    "[prediction]": OutputSpec,
    "[[rules]]": RuleSpec,
    "[[steps]]": StepSpec,
}


def documented(section: str) -> dict[str, str]:
    """Key -> default, as the first table of the section says."""
    (_, _, rest) = PAGE.partition(f"\n### {section}\n")
    lines = rest.partition("| key | default | meaning |")[2].splitlines()[1:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1]
    return rows


def shown(value: Any) -> str:
    """A default as TOML writes it."""
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, float) and math.isinf(value):
        return "`inf`" if value > 0 else "`-inf`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value!s}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(shown(item).strip("`") for item in value) + "]`"
    return f"`{value}`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_stands_there_with_its_default(section: str) -> None:
    expected = {
        name: "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        for name, field in SECTIONS[section].model_fields.items()
    }
    assert documented(section) == expected


def test_every_built_in_extractor_is_named() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("| built-in |")[2].partition("\n\n")[0], re.MULTILINE)
    assert set(rows) == {extractor.name for extractor in builtin_extractors()}


def test_every_transform_is_named_with_its_options() -> None:
    rows = PAGE.partition("| transform |")[2].partition("\n\n")[0]
    documented = {
        name: re.findall(r"`(\w+)`", options)
        for name, options in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", rows, re.MULTILINE)
    }
    assert documented == {name: list(kind.__struct_fields__) for name, kind in TRANSFORMS.items()}


def test_example_is_valid_and_fits_together() -> None:
    model_toml, configuration = (tomllib.loads(text) for text in EXAMPLES[:2])
    manifest = validate(Manifest, model_toml, "docs/models.md")
    config = validate(Config, configuration, "docs/models.md")
    assert config.assets[0].models == (manifest.name,)
    assert manifest.window is not None
    RuleEngine("press-7", manifest)
    extractor = next(one for one in builtin_extractors() if one.name == manifest.features.extractor)
    builder = WindowBuilder("press-7", manifest.window, manifest.features.options)
    readings = [
        Reading(name, float(second), "1", Clock(second * 10**9, 0, 0))
        for second in range(90)
        for name in manifest.window.signals
    ]
    windows = builder.add(Batch(tuple(readings)))
    assert [window.end_ns // 10**9 for window in windows] == [19, 29, 39, 49, 59, 69, 79, 89]
    for window in windows:
        found = extractor.extract(window)
        assert found is not None
        for tensor in manifest.inputs:
            assert (-1, *np.shape(found.tensors[tensor.name])) == tensor.shape
