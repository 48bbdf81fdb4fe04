"""`python -m millhand_images sbom` of a real environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from millhand_images import sbom
from millhand_images.process import BuildError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment that holds click alone."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    source = Path(sysconfig.get_path("purelib"))
    shutil.copytree(source / "click", site / "click")
    for info in source.glob("click-[0-9]*.dist-info"):
        shutil.copytree(info, site / info.name)
    return folder / "bin/python"


def made(*words):
    return CliRunner().invoke(sbom.command, [str(word) for word in words], catch_exceptions=True)


def test_it_names_what_is_installed_and_twice_the_same(environment, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path in (first, second):
        done = made("--python", environment, "--project", ROOT / "pyproject.toml", "--output", path)
        assert done.exit_code == 0, done.output
    bill = json.loads(first.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "millhand"
    (click,) = bill["components"]
    assert click["purl"] == f"pkg:pypi/click@{version('click')}"
    assert first.read_bytes() == second.read_bytes()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(first.read_text()) is None


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="dpkg is not here")
def test_it_names_the_systems_packages_too(environment, tmp_path):
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: tini\nStatus: install ok installed\nArchitecture: amd64\nVersion: 0.19.0-1\nMaintainer: x\n"
        "Description: x\n\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
        "Maintainer: x\nDescription: x\n\n"
    )
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/os-release").write_text('NAME="Ubuntu"\nID=ubuntu\n')
    done = made("--python", environment, "--system", tmp_path)
    assert done.exit_code == 0, done.output
    urls = {part["purl"] for part in json.loads(done.output)["components"]}
    assert "pkg:deb/ubuntu/tini@0.19.0-1?arch=amd64" in urls and not [url for url in urls if "gone" in url]


def test_an_interpreter_that_is_none_is_named(tmp_path):
    done = made("--python", tmp_path / "python")
    assert isinstance(done.exception, BuildError) and "cyclonedx_py" in done.exception.message
