"""`python -m millhand_images`: one command for each thing that is built."""

from __future__ import annotations

import importlib
import sys

import click

from millhand.cli.output import print_error
from millhand.errors import MillhandError

# command -> module; each module is imported when its command is called.
COMMANDS = {
    "bundle": "millhand_images.bundle",
    "deb": "millhand_images.deb",
    "lock": "millhand_images.lock",
    "release": "millhand_images.release",
    "sbom": "millhand_images.sbom",
}


class LazyGroup(click.Group):
    """Finds commands by COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command


@click.group(cls=LazyGroup)
def root() -> None:
    """Build what a node is installed from."""


def main() -> None:
    """Entry point: a MillhandError becomes `Error: …` and `Try: …`, and exit code 1."""
    try:
        root.main(prog_name="millhand_images", standalone_mode=True)
    except MillhandError as error:
        print_error(error.message, error.hint, error.code, as_json=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
