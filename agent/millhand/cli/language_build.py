"""`millhand model build`, `compare` and `verify` where the model is a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import LINE_CHARACTERS, Output, table, wrapped
from millhand.errors import InputError, ModelError

if TYPE_CHECKING:
    from millhand.language.library import LanguageModel, Library
    from millhand.proof.signature import Keyring
    from millhand.proof.verification import Subject
    from millhand.workshop.listener import Listener
    from millhand.workshop.shelf import Shelf
    from millhand.workshop.site import Site


def build(
    output: Output,
    site: Site,
    model: LanguageModel,
    only: Sequence[str],
    data: Path | None,
    fresh: bool,
    listener: Listener,
) -> None:
    """Make precisions, prove each, print what came of it."""
    from millhand.cli import compare
    from millhand.language.precisions import build_precisions

    report = build_precisions(site, model, listener, only=[name.upper() for name in only], data=data, fresh=fresh)
    if not output.as_json:
        click.echo()
    compare.show(output, site.shelf, report)
    if not output.as_json and site.config.language.model == model.name:
        click.echo("millhand language restart has a running daemon take it up.")


def prove(
    output: Output, site: Site, model: LanguageModel, target: str | None, data: Path | None, listener: Listener
) -> None:
    """Measure a model as it is, print its proof."""
    import msgspec

    from millhand.cli.proof_text import describe
    from millhand.language.library import own_subject
    from millhand.language.original import prove_language_model
    from millhand.proof.verification import verify

    proof = prove_language_model(site, model, listener, target=target, data=data)
    subject = own_subject(model, site.shelf)
    verdict = verify(subject, site.repository.keyring)
    if not output.as_json:
        click.echo()
    plain = {"state": verdict.state, "reason": verdict.reason, "proof": msgspec.to_builtins(proof)}
    output.emit(plain, describe(proof, verdict, verdict.folder or subject.folder))


def compare_precisions(output: Output, site: Site, model: LanguageModel) -> None:
    """The last build of one model."""
    from millhand.cli import compare
    from millhand.language.library import VERSION
    from millhand.language.precisions import own_target
    from millhand.workshop.report import read_report

    place = site.shelf.place(model.name, VERSION, own_target(site).name)
    compare.show(output, site.shelf, read_report(place, model.name))


def compare_models(output: Output, site: Site, library: Library, names: Sequence[str], data: Path | None) -> None:
    """Rank whole models, measured now on one text."""
    import msgspec

    from millhand.language.comparing import compare

    missing = [name for name in names if name not in library.names()]
    if missing:
        raise InputError(
            f"'{missing[0]}' is no language model of this node: only those are compared with each other",
            hint="millhand model compare NAME shows what was made of one model",
        )
    ranked, source = compare(site, [library.model(name) for name in names], data, _told(output))
    rows = [
        (place, entry.name, entry.precision, _mib(entry.bytes), f"{entry.right}/{entry.questions}",
         f"{entry.bits_per_byte:.3f}", f"{entry.perplexity:.4g}",
         f"{entry.tokens_per_s:.1f}", f"{entry.prompt_tokens_per_s:.0f}", _mib(entry.memory_bytes))
        for place, entry in enumerate(ranked, 1)
    ]  # fmt: skip
    headers = ("", "model", "type", "MiB", "right", "bits/B", "perplexity", "tok/s", "read/s", "mem")
    words = source.partition("; sha256")[0]
    text = (
        f"Best first: by the questions of pack '{site.config.pack.name}', then by bits for a byte of a text, which "
        f"unlike perplexity may be compared between tokenizers. Text: {words}. tok/s written by one user, read/s "
        "tokens of a prompt, mem in MiB."
    )
    plain = {"text": source, "models": [msgspec.to_builtins(entry) for entry in ranked]}
    output.emit(plain, [*table(headers, rows, LINE_CHARACTERS), "", *wrapped(text)])


def verified(library: Library, shelf: Shelf, keyring: Keyring, name: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """(what was found, whether it is bad) of a language model's own files and of each precision made of it."""
    from millhand.language.library import VERSION, own_subject
    from millhand.proof.verification import verify

    model = library.model(name)
    state, reason = "whole", ""
    try:
        check_files(model)
        own = verify(own_subject(model, shelf), keyring)
        if own.folder is not None:
            state, reason = own.state, own.reason
    except ModelError as error:
        state, reason = "refused", error.message
    yield {"model": name, "artifact": "its own", "state": state, "reason": reason}, state == "refused"
    for place in sorted(shelf.place(name, VERSION, "").glob("*/")):
        choice = shelf.choice(name, VERSION, place.name)
        for candidate in shelf.candidates(name, VERSION, place.name):
            verdict = verify(shelf.subject(name, VERSION, place.name, candidate), keyring)
            serves = choice is not None and choice.candidate == candidate.name
            entry = {
                "model": name,
                "artifact": f"{place.name}/{candidate.name}",
                "state": verdict.state,
                "reason": verdict.reason,
            }
            yield entry, verdict.state == "refused" and (serves or not verdict.failed_gate)


def subject_of(model: LanguageModel, shelf: Shelf, candidate: str | None, target: str | None) -> Subject:
    """A precision that was made of a model, or its own files where none is named. Raises ModelError."""
    from millhand.language.library import VERSION, own_subject

    if candidate is None:
        return own_subject(model, shelf)
    names = []
    for place in sorted(shelf.place(model.name, VERSION, "").glob("*/")):
        for found in shelf.candidates(model.name, VERSION, place.name):
            if found.name == candidate and target in (None, place.name):
                return shelf.subject(model.name, VERSION, place.name, found)
            names.append(found.name)
    raise ModelError(
        f"language model '{model.name}' has no candidate '{candidate}'",
        hint=f"there are: {', '.join(names) or 'none'}; millhand model build {model.name} makes them",
    )


def chosen_of(name: str, shelf: Shelf) -> Subject | None:
    """The precision that was chosen in the place of a model's own file; None where several targets have one."""
    from millhand.language.library import VERSION

    found = []
    for place in sorted(shelf.place(name, VERSION, "").glob("*/")):
        choice = shelf.choice(name, VERSION, place.name)
        if choice is not None and choice.candidate:
            candidate = shelf.find(name, VERSION, place.name, choice.candidate)
            found.append(shelf.subject(name, VERSION, place.name, candidate))
    return found[0] if len(found) == 1 else None


def check_files(model: LanguageModel) -> None:
    """Raises ModelError where a file is not the one that was added, or is gone."""
    from millhand.proof.digest import digest

    for name, wanted in model.manifest.sha256.items():
        try:
            found = digest({name: model.folder / name})
        except OSError as error:
            raise ModelError(
                f"'{model.folder / name}' cannot be read: {error.strerror}", hint="add it again"
            ) from error
        if found != wanted:
            raise ModelError(
                f"'{model.folder / name}' is not what was added: its SHA-256 is {found[:12]}…, language.toml says "
                f"{wanted[:12]}…",
                hint=f"millhand model add {model.name} {model.manifest.source} --replace",
            )


def _told(output: Output) -> Any:
    def tell(text: str) -> None:
        if not output.as_json:
            click.echo(f"{text} ...", err=True)

    return tell


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f}"
