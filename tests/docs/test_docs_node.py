"""docs/first-node.md and docs/operate.md walked on a bare Debian 12, from top to end, every command of them.

There is no systemd in it: units are read as installed, and what they start is started. For the downgrade the same
package lies where the page has the older one; tests/images goes from version to version.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_kit import Command, blocks, commands
from node_kit import Node
from package_kit import bare_root, install, missing, package
from units_kit import PROGRAMS, Units

ROOT = Path(__file__).parents[2]
FAILS = {"millhand check": (0, 3)}
"""A node without NTP and with a broker that is not there has warnings."""
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.skipif(bool(missing()), reason=missing())]


class Walk:
    """A node, and a person who does what the pages say."""

    def __init__(self, node: Node, units: Units) -> None:
        self.node, self.units = node, units

    def page(self, name: str) -> dict[str, str]:
        """Do all that a page says; returns what each command printed, the last time where there are several."""
        said: dict[str, str] = {}
        for block in blocks(ROOT / "docs" / name):
            if block.file:
                (self.node.root / "root" / block.file).write_text("\n".join(block.text) + "\n")
            for command in commands(block) if block.place else []:
                printed = said[command.text] = self._do(command)
                assert not command.missing(printed), f"{command}: '{command.missing(printed)}' did not come:\n{printed}"
        return said

    def _do(self, command: Command) -> str:
        program = command.text.split()[0]
        if program in PROGRAMS:
            return self.units.command(command.text)
        again = program == "dpkg" and "-i" in command.text and self.units.running
        done = self.node.run("sh", "-c", f"cd /root && {command.text}", codes=FAILS.get(command.text, (0,)))
        if again:  # as the package does where systemd runs
            self.units.command("systemctl restart millhand")
        return done.stdout


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    root = tmp_path / "root"
    bare_root("amd64", root)
    deb = install(root, package("amd64", tmp_path / "dist"))
    previous = root / "root/previous"
    previous.mkdir()
    shutil.copy(root / deb[1:], previous)
    try:
        with Node("press-7", root) as node:
            units = Units(node, tmp_path)
            yield Walk(node, units)
            units.end()
    finally:
        shutil.rmtree(root)


def test_a_bare_node_is_walked_to_its_first_prediction_and_operated(walk: Walk) -> None:
    first = walk.page("first-node.md")
    (alert, *_) = [line.split()[0] for line in first["millhand alert list"].splitlines() if "bearing" in line]
    later = walk.page("operate.md")
    assert alert in later["millhand alert list"], "it outlived backup, restore, stops and starts"
    root = walk.node.root
    assert not (root / "etc/millhand").exists() and not (root / "var/lib/millhand").exists(), "it was purged at the end"
