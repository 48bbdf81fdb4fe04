"""`millhand completion`: the shell completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from millhand.errors import InputError


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of SHELL.

    Add `eval "$(millhand completion bash)"` to ~/.bashrc.
    """
    from millhand.cli import root

    completion = get_completion_class(shell)
    if completion is None:
        raise InputError(f"shell '{shell}' is not supported", hint="use bash, zsh or fish")
    click.echo(completion(root, {}, "millhand", "_MILLHAND_COMPLETE").source())
