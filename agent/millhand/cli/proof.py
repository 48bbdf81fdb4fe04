"""`millhand model proof`, `verify` and `sign`: what was measured, whether it fits, and who stands for it.

They read files and need no daemon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.language_build import chosen_of, subject_of, verified
from millhand.cli.output import Output, json_option, plural, table_with_reasons, wrapped, writes_data
from millhand.errors import InputError, ModelError
from millhand.proof.document import ORIGINAL

if TYPE_CHECKING:
    from millhand.proof.signature import Keyring
    from millhand.proof.verification import Subject, Verdict
    from millhand.serving.repository import ModelFolder, Repository
    from millhand.workshop.shelf import Shelf

version_option = click.option("--version", type=click.IntRange(1), help="Default: the newest that the policy serves.")
candidate_option = click.option("--candidate", help="This candidate. Default: the model's own artifact.")
shown_option = click.option(
    "--candidate",
    help=f"This candidate, or '{ORIGINAL}'. Default: what was chosen to serve, else the model's own artifact.",
)
target_option = click.option("--target", help="The candidate's target, where several have one of that name.")


@click.command("proof", short_help="Show what was measured of a model.")
@click.argument("name")
@version_option
@shown_option
@target_option
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the page for people to this file.")
@json_option
@click.pass_context
def proof(
    ctx: click.Context, name: str, version: int | None, candidate: str | None, target: str | None, html: Path | None
) -> None:
    """Show the proof of model NAME: what was measured beside the original, and whether it may be believed."""
    import msgspec

    from millhand.cli.proof_text import describe
    from millhand.proof.page import page
    from millhand.proof.verification import verify

    output: Output = ctx.obj
    repository = output.repository()
    subject = _subject(output, repository, name, version, None if candidate == ORIGINAL else candidate, target)
    if candidate is None:
        subject = _serving(output, subject) or subject
    verdict = verify(subject, repository.keyring)
    if verdict.proof is None:
        raise ModelError(f"{subject}: {verdict.reason}", hint=_with_candidates(output, verdict, subject))
    lines = describe(verdict.proof, verdict, verdict.folder or subject.folder)
    if html is not None:
        _write(html, page(verdict.proof))
        lines += ["", f"The page is '{html}'."]
    output.emit({**_entry(subject, verdict), "proof": msgspec.to_builtins(verdict.proof)}, lines)


@click.command("verify", short_help="Check artifacts against their proofs.")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All models.")
@json_option
@click.pass_context
def verify(ctx: click.Context, name: str | None, everything: bool) -> None:
    """Check every version of model NAME and every candidate made of it against its proof.

    A language model's own files are held against the hashes that it was added with.
    Ends with 1 where one is refused, or unproved under [models] require_proof. A candidate that did not pass its gate
    is listed as refused; that counts only if it is the one that was chosen to serve.
    """
    from millhand.language.library import open_library
    from millhand.proof.verification import verify as verdict_of

    output: Output = ctx.obj
    if everything == bool(name):
        raise click.UsageError("name one model, or give --all", ctx)
    repository = output.repository()
    library = open_library(output.config())
    language = library.names() if everything else [str(name)] if name in library.names() else []
    others = [] if language else [repository.find(str(name)).name] if name else []
    names = repository.names() if everything else others
    found = [
        (subject, verdict_of(subject, repository.keyring), chosen)
        for model in names
        for subject, chosen in _subjects(repository, repository.models[model], _shelf(output))
    ]
    rows: list[Sequence[Any]] = [
        (subject.model, subject.version, _what(subject), verdict.state, verdict.reason) for subject, verdict, _ in found
    ]
    bad = repository.bad if everything else []
    rows += [(folder.path.name, None, "-", "bad", folder.message) for folder in bad]
    entries = [_entry(subject, verdict) for subject, verdict, _ in found]
    entries += [{"folder": str(folder.path), "state": "bad", "reason": folder.message} for folder in bad]
    made = [item for model in language for item in verified(library, _shelf(output), repository.keyring, model)]
    rows += [(entry["model"], None, entry["artifact"], entry["state"], entry["reason"]) for entry, _ in made]
    entries += [entry for entry, _ in made]
    headers = ("model", "version", "artifact", "proof", "why")
    output.emit(entries, table_with_reasons(headers, rows) if rows else ["There is no model."])
    _raise_bad(found, repository)
    for entry, is_bad in made:
        if is_bad:
            raise ModelError(f"language model '{entry['model']}', {entry['artifact']}: {entry['reason']}")


@click.command("sign", short_help="Sign a proof with the plant's key.")
@click.argument("name")
@click.option(
    "--key", "key_path", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A private key, PEM."
)
@version_option
@candidate_option
@target_option
@json_option
@click.pass_context
@writes_data
def sign(
    ctx: click.Context, name: str, key_path: Path, version: int | None, candidate: str | None, target: str | None
) -> None:
    """Add the plant's signature to the proof of model NAME, so that other nodes take the artifact over.

    Only what is proved on this node is signed.
    """
    from millhand.proof.file import write_proof
    from millhand.proof.keys import read_private
    from millhand.proof.signature import sign as signed
    from millhand.proof.verification import verify as verdict_of

    output: Output = ctx.obj
    repository = output.repository()
    key = read_private(key_path)
    _refuse_own(repository.keyring, key.public.id, key_path)
    subject = _subject(output, repository, name, version, candidate, target)
    verdict = verdict_of(subject, repository.keyring)
    if verdict.state != "proved" or verdict.proof is None:
        raise ModelError(f"{subject} is {verdict.state}, and is not signed: {verdict.reason}", hint=verdict.hint)
    folder = verdict.folder or subject.folder
    try:
        write_proof(folder, signed(verdict.proof, key, "plant"))
    except OSError as error:
        raise ModelError(
            f"the proof in '{folder}' cannot be written: {error.strerror}",
            hint="run as the user that the folder belongs to",
        ) from error
    facts = {**_entry(subject, verdict), "key": key.public.id}
    output.emit(facts, wrapped(f"Signed by plant key {key.public.id}: {subject}."))


def _subject(
    output: Output,
    repository: Repository,
    name: str,
    version: int | None,
    candidate: str | None,
    target: str | None,
) -> Subject:
    """The artifact that the options name. Raises ModelError naming what is there."""
    from millhand.language.library import open_library

    if name in (library := open_library(output.config())).names():
        return subject_of(library.model(name), _shelf(output), candidate, target)
    folder = repository.find(name)
    number = folder.chosen()[-1] if version is None else version
    if number not in folder.versions:
        known = ", ".join(map(str, folder.versions))
        raise ModelError(f"model '{name}' has no version {number}", hint=f"its folder holds {known}")
    if candidate is None:
        if target is not None:
            raise InputError("--target without --candidate says nothing", hint="name the candidate too")
        return repository.subject(folder, number)
    found = [
        subject
        for subject, _ in _candidates(folder, number, _shelf(output))
        if subject.candidate == candidate and target in (None, subject.target)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        targets = ", ".join(subject.target for subject in found)
        raise ModelError(f"several candidates are called '{candidate}'", hint=f"give --target, one of {targets}")
    there = ", ".join(_what(subject) for subject, _ in _candidates(folder, number, _shelf(output))) or "none"
    where = f" for {target}" if target else ""
    raise ModelError(
        f"model '{name}' version {number} has no candidate '{candidate}'{where}",
        hint=f"there are: {there}; millhand model build {name} makes them",
    )


def _serving(output: Output, own: Subject) -> Subject | None:
    """The candidate that was chosen in the place of a model's own artifact; None where several targets have one."""
    from millhand.language.library import open_library

    if own.candidate:
        return None
    if own.model in open_library(output.config()).names():
        return chosen_of(own.model, _shelf(output))
    folder = output.repository().find(own.model)
    chosen = [subject for subject, serves in _candidates(folder, own.version, _shelf(output)) if serves]
    return chosen[0] if len(chosen) == 1 else None


def _subjects(repository: Repository, folder: ModelFolder, shelf: Shelf) -> Iterator[tuple[Subject, bool]]:
    """(artifact, whether it may come to serve) of everything that there is of a model."""
    for number in folder.versions:
        yield repository.subject(folder, number), True
        yield from _candidates(folder, number, shelf)


def _candidates(folder: ModelFolder, version: int, shelf: Shelf) -> Iterator[tuple[Subject, bool]]:
    """(candidate, whether it was chosen to serve) for every target."""
    for place in sorted(shelf.place(folder.name, version, "").glob("*/")):
        choice = shelf.choice(folder.name, version, place.name)
        for candidate in shelf.candidates(folder.name, version, place.name):
            chosen = choice is not None and choice.candidate == candidate.name
            yield shelf.subject(folder.name, version, place.name, candidate), chosen


def _raise_bad(found: list[tuple[Subject, Verdict, bool]], repository: Repository) -> None:
    """Raises ModelError where something is refused, or a trusted key cannot be read."""
    bad = [
        (subject, verdict)
        for subject, verdict, serves in found
        if (verdict.state == "refused" and (serves or not verdict.failed_gate))
        or (verdict.state == "unproved" and serves and repository.require_proof)
    ]
    if bad:
        subject, verdict = bad[0]
        more = f" (and {plural(len(bad) - 1, 'more')})" if bad[1:] else ""
        raise ModelError(f"{subject} is {verdict.state}{more}: {verdict.reason}", hint=verdict.hint)
    faults = repository.keyring.read()[1]
    if faults:
        raise faults[0]


def _refuse_own(keyring: Keyring, key: str, path: Path) -> None:
    node = keyring.node()
    if node is not None and node.id == key:
        raise ModelError(
            f"'{path}' is this node's own key; a plant's key is a pair of its own",
            hint="millhand key new FOLDER makes one, away from the node",
        )


def _with_candidates(output: Output, verdict: Verdict, subject: Subject) -> str:
    """The remedy, with the candidates whose proofs can be shown instead."""
    from millhand.proof.document import PROOF

    places = _shelf(output).place(subject.model, subject.version, "").glob(f"*/*/{PROOF}")
    names = sorted({path.parent.name for path in places})
    return (
        f"{verdict.hint}; or give --candidate: {', '.join(names)}" if names and not subject.candidate else verdict.hint
    )


def _entry(subject: Subject, verdict: Verdict) -> dict[str, Any]:
    return {
        "model": subject.model,
        "version": subject.version,
        "candidate": subject.candidate,
        "target": subject.target,
        "folder": str(subject.folder),
        "state": verdict.state,
        "reason": verdict.reason,
        "hint": verdict.hint,
        "signers": list(verdict.signers),
    }


def _what(subject: Subject) -> str:
    return f"{subject.target}/{subject.candidate}" if subject.candidate else "its own"


def _shelf(output: Output) -> Shelf:
    from millhand.workshop.shelf import Shelf

    config = output.config()
    return Shelf(config.models.built_dir or config.node.data_dir / "built")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}", hint="name another file") from error
