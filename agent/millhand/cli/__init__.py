"""The command line; the only place that prints errors and exits. One module a command group, imported when called."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from millhand import __version__
from millhand.cli.output import Output, print_error
from millhand.errors import MillhandError, suggestion

# command -> (module, one line of help). The line stands here so that `--help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run the agent in the foreground."),
    "demo": ("demo", "Watch a machine fail, be predicted, and be reported."),
    "setup": ("setup", "Set this node up: five questions, or one file."),
    "check": ("check", "Check this node: errors, warnings, remedies."),
    "health": ("health", "Say by the exit code whether the agent answers."),
    "hw": ("hw", "Show this node's hardware."),
    "profile": ("profile", "List, show and match hardware profiles."),
    "plugin": ("plugin", "List, show and test plugins."),
    "model": ("model", "List, load, measure, build and verify models."),
    "language": ("language", "Show and restart the language model's servers."),
    "key": ("key", "Show, export and make the keys that sign proofs."),
    "gateway": ("gateway", "Tokens of the gateway's clients, and what guards decided."),
    "predict": ("predict", "Ask a served model."),
    "alert": ("alert", "List and acknowledge alerts."),
    "order": ("order", "List, show and edit work orders."),
    "ask": ("ask", "Ask the node's language model, from the plant's manuals."),
    "conversation": ("conversation", "List, show, export and delete conversations."),
    "knowledge": ("knowledge", "Add, list, remove and search manuals and past orders."),
    "readings": ("readings", "Export stored readings as CSV."),
    "telemetry": ("telemetry", "Show and follow what goes to the hub."),
    "bundle": ("bundle", "Verify and install an offline bundle."),
    "hub": ("hub", "Run and query the central hub."),
    "config": ("config", "Show, validate and describe the configuration."),
    "completion": ("completion", "Print the shell completion script."),
}

EXIT_CODES = {"ok": 0, "error": 1, "usage": 2, "check_warnings": 3, "check_errors": 4, "interrupted": 130}


class LazyGroup(click.Group):
    """Imports a command's module only when it is called, so that `millhand --help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"millhand.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"command '{args[0]}' is not known{suggestion(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A reader that has seen enough (`| head`) ends it well, without noise."""
        try:
            outcome = super().invoke(ctx)
            sys.stdout.flush()
            return outcome
        except BrokenPipeError:
            # Or the interpreter would try to write the rest at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CODES["ok"]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "-c",
    "config_path",
    envvar="MILLHAND_CONFIG",
    type=click.Path(path_type=Path),
    help="Configuration file. Default: /etc/millhand/millhand.toml, if it exists.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="millhand")
@click.pass_context
def root(ctx: click.Context, config_path: Path | None, as_json: bool, verbose: bool) -> None:
    """millhand looks after the machines around a factory node: it predicts faults, writes work orders, loses nothing.

    Without a command it tells the node's state and the next step.
    """
    ctx.obj = Output(config_path=config_path, as_json=as_json, verbose=verbose)
    if ctx.invoked_subcommand is None:
        from millhand.cli.state import show_state

        show_state(ctx.obj)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: prints errors as `Error: …` and `Try: …`, and exits with a documented code."""
    words = sys.argv[1:] if arguments is None else arguments
    verbose = "-v" in words or "--verbose" in words
    as_json = "--json" in words
    try:
        code = root.main(args=words, prog_name="millhand", standalone_mode=False)
    except MillhandError as error:
        if verbose:
            raise
        print_error(error.message, error.hint, error.code, as_json)
        sys.exit(EXIT_CODES["error"])
    except click.UsageError as error:
        hint = f"{error.ctx.command_path} --help" if error.ctx else "millhand --help"
        print_error(error.format_message(), hint, "usage", as_json)
        sys.exit(EXIT_CODES["usage"])
    except click.ClickException as error:
        print_error(error.format_message(), "", "error", as_json)
        sys.exit(EXIT_CODES["error"])
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(EXIT_CODES["interrupted"])
    sys.exit(code if isinstance(code, int) else EXIT_CODES["ok"])
