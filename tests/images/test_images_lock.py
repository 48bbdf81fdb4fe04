"""The wheels that the package carries: pinned by hash, the same versions on every target, as the tests had them."""

from __future__ import annotations

import re

import pytest

from millhand_images.deb import debian_version
from millhand_images.lock import LEFT_OUT, canonical, read, requirements
from millhand_images.process import BuildError
from millhand_images.target import GLIBC_MINOR_CAP, MACHINES, ROOT, Target, glibc_minor

TARGETS = [Target(arch, python) for python in ("3.11", "3.12") for arch in MACHINES]
CONSTRAINTS = {
    canonical(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_lock_holds_what_the_project_asks_for_in_the_tested_versions(target: Target) -> None:
    pins = {pin.name: pin.version for pin in read(target)}
    wanted = {canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0]) for line in requirements()}
    assert wanted <= pins.keys()
    assert not pins.keys() & LEFT_OUT
    assert {name: CONSTRAINTS.get(name) for name in pins} == pins


def test_every_target_carries_the_same() -> None:
    assert len({tuple((pin.name, pin.version) for pin in read(target)) for target in TARGETS}) == 1


def test_a_target_without_a_lock_says_how_to_write_one() -> None:
    with pytest.raises(BuildError, match=r"no lock for arm64-python3\.9") as caught:
        read(Target("arm64", "3.9"))
    assert "lock --arch arm64 --python 3.9" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "said"),
    [("1.2.3", "1.2.3"), ("1.0rc1", "1.0~rc1"), ("1.0.dev2", "1.0~dev2"), ("1.0a1", "1.0~a1"), ("1.0+a.1", "1.0+a.1")],
)
def test_a_version_is_written_as_debian_orders_it(version: str, said: str) -> None:
    assert debian_version(version) == said


@pytest.mark.parametrize("version", ["1.0~test", "", "1.0; rm", "v1"])
def test_a_version_of_another_form_is_refused(version: str) -> None:
    with pytest.raises(BuildError, match="cannot be built"):
        debian_version(version)


@pytest.mark.parametrize(
    ("name", "minor"),
    [
        ("a-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl", 17),
        ("a-1-cp311-abi3-manylinux_2_34_aarch64.whl", 34),
        ("a-1-py3-none-any.whl", 0),
    ],
)
def test_the_oldest_glibc_that_a_wheel_runs_with(name: str, minor: int) -> None:
    assert glibc_minor(name) == minor <= GLIBC_MINOR_CAP
