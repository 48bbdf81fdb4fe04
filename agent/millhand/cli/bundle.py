"""`millhand bundle`: one signed file that brings this node up to date without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millhand.cli.output import Output, json_option, labelled
from millhand.errors import BundleError

if TYPE_CHECKING:
    from millhand.bundle.archive import Verified

SCRIPT = "install.sh"
MEGABYTE = 1e6


def _key_option(function: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--key",
        "key_paths",
        multiple=True,
        type=click.Path(path_type=Path, dir_okay=False),
        help="The plant's public key (PEM). Without one those of [models] trusted_keys count.",
    )(function)


@click.group("bundle")
def command() -> None:
    """Verify and install a bundle: one signed file that needs no network."""


@command.command("verify", short_help="Check a bundle's sum, signature and every hash.")
@click.argument("file", type=click.Path(path_type=Path))
@_key_option
@json_option
@click.pass_context
def verify(ctx: click.Context, file: Path, key_paths: tuple[Path, ...]) -> None:
    """Check the sum, the signature and every hash of the bundle FILE, and tell what it is. Changes nothing."""
    output: Output = ctx.obj
    found = _verified(output, file, key_paths)
    manifest = found.manifest
    size = sum(entry.bytes for entry in manifest.files)
    facts = {
        "version": manifest.version,
        "target": manifest.target,
        "architecture": manifest.architecture,
        "system": manifest.system,
        "python": manifest.python,
        "date": manifest.date,
        "key": found.key.id,
        "bytes": size,
        "files": [entry._asdict() for entry in manifest.files],
    }
    lines = [
        *labelled("bundle", f"millhand {manifest.version} for {manifest.target}, of {manifest.date}"),
        *labelled("for", f"{manifest.system}, {manifest.architecture}, Python {manifest.python}"),
        *labelled("signed", f"by {found.key.id}, '{found.key.path}'"),
        *labelled("holds", f"{len(manifest.files)} files, {size / MEGABYTE:.1f} MB; every one is as it was signed"),
    ]
    output.emit(facts, lines)


@command.command("install", short_help="Install a bundle.")
@click.argument("file", type=click.Path(path_type=Path))
@_key_option
@click.option("--yes", is_flag=True, help="Do it; without it, what would change is told.")
@click.option("--downgrade", is_flag=True, help="Install an older version than the one that is here.")
@click.pass_context
def install(ctx: click.Context, file: Path, key_paths: tuple[Path, ...], yes: bool, downgrade: bool) -> None:
    """Verify the bundle FILE, then hand over to the install.sh in it, which says what it changes. Needs root to act.

    The script replaces this program too, so it goes on alone.
    """
    found = _verified(ctx.obj, file, key_paths)
    script = found.read(SCRIPT)
    number = os.memfd_create(SCRIPT, 0)
    os.write(number, script)
    options = [*(["--yes"] if yes else []), *(["--downgrade"] if downgrade else [])]
    words = ["sh", f"/proc/self/fd/{number}", os.fspath(file), "--key", os.fspath(found.key.path), *options]
    sys.stdout.flush()
    os.execv("/bin/sh", words)  # noqa: S606  # it replaces the files of this very program


@command.command("lay", short_help="Lay what an unpacked bundle holds (install.sh calls it).")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only-data", is_flag=True, help="Leave the libraries alone.")
@click.pass_context
def lay(ctx: click.Context, folder: Path, only_data: bool) -> None:
    """Lay libraries, models and engines of the unpacked, verified bundle FOLDER; install.sh calls it as root.

    A line is printed for what has changed. As root the data folder is written by a process of the user that it
    belongs to.
    """
    from millhand.bundle.laying import lay_data, lay_libraries

    output: Output = ctx.obj
    data_dir = output.config().node.data_dir
    if not only_data:
        for change in lay_libraries(folder):
            click.echo(change)
    try:
        owner = data_dir.stat()
    except OSError as error:
        raise BundleError(
            f"[node] data_dir '{data_dir}' is not there: {error.strerror}", hint="install the package millhand first"
        ) from error
    if os.geteuid() != 0 or owner.st_uid == 0:
        for change in lay_data(folder, data_dir):
            click.echo(change)
        return
    sys.stdout.flush()
    config = [] if output.config_path is None else ["--config", os.fspath(output.config_path)]
    done = subprocess.run(
        [sys.executable, "-m", "millhand", *config, "bundle", "lay", os.fspath(folder), "--only-data"],
        user=owner.st_uid,
        group=owner.st_gid,
        extra_groups=[],
        check=False,
    )
    ctx.exit(done.returncode)


def _verified(output: Output, file: Path, key_paths: tuple[Path, ...]) -> Verified:
    """Raises BundleError; ModelError where a key cannot be read."""
    from millhand.bundle.archive import verify as verified
    from millhand.proof.keys import read_public

    paths = key_paths or output.config().models.trusted_keys
    if not paths:
        raise BundleError(
            "no key of the plant is known here",
            hint="--key plant.public.pem, or name it in [models] trusted_keys",
        )
    return verified(file, [read_public(path) for path in paths])
