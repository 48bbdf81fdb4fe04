"""`millhand model prove`: measure a model as it is on this node, and sign what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from millhand.cli.build import listener_of, typical_batch
from millhand.cli.output import Output, json_option, wrapped, writes_data


@click.command("prove", short_help="Measure a model as it is, and sign the proof.")
@click.argument("name")
@click.option("--target", help="Where on this node it is measured: cpu or its chip. Default: where it serves.")
@click.option("--version", type=click.IntRange(1), help="Default: the newest that the model's policy serves.")
@click.option("--data", type=click.Path(path_type=Path), help="Rows or a text to measure it by.")
@json_option
@click.pass_context
@writes_data
def command(ctx: click.Context, name: str, target: str | None, version: int | None, data: Path | None) -> None:
    """Prove model NAME as it is: run its own artifact on this node, measure it, and sign.

    An ensemble is measured as a whole, and the models that it uses are proved before it where they are not. Of a
    language model size, tokens/s, memory and perplexity are measured; --data is a text then. Nothing is
    compared: how right the model is, is what the proof says. [models] require_proof then accepts it.
    """
    import msgspec

    from millhand.cli import language_build
    from millhand.cli.proof_text import describe
    from millhand.language.library import open_library
    from millhand.workshop.boards import target_named
    from millhand.workshop.original import prove_model
    from millhand.workshop.site import open_site

    output: Output = ctx.obj
    site = open_site(output.config())
    library = open_library(output.config())
    if name in library.names():
        language_build.prove(output, site, library.model(name), target, data, listener_of(output))
        return
    folder = site.repository.find(name)
    wanted = target_named(target, site.targets, site.profiles) if target else site.own_target(folder)
    proof = prove_model(site, name, wanted, listener_of(output), version, data, typical_batch(output, name))
    verdict = site.repository.verdict(folder, proof.version)
    lines = describe(proof, verdict, verdict.folder or folder.path)
    if not output.as_json:
        click.echo()
    if site.repository.require_proof:
        lines += ["", *wrapped(f"millhand model load {name} takes it up where it was refused.")]
    output.emit({"state": verdict.state, "reason": verdict.reason, "proof": msgspec.to_builtins(proof)}, lines)
