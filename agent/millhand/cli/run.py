"""`millhand run`: the agent in the foreground."""

from __future__ import annotations

import click

from millhand.cli.output import Output


@click.command("run")
@click.pass_obj
def command(output: Output) -> None:
    """Run the agent in the foreground until SIGTERM or Ctrl-C; SIGHUP reads the configuration again."""
    from millhand.daemon import run
    from millhand.logs import configure_logs

    config = output.config()
    configure_logs(config.log)
    run(config, output.config_path)
