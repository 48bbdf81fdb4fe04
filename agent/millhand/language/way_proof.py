"""Has the ways of serving a language model measured on this node, and leaves the signed proof of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millhand.errors import MillhandError, ModelError
from millhand.hookspecs import TunableServer
from millhand.language.launch import Launch
from millhand.language.library import VERSION, LanguageModel, Library, open_library
from millhand.language.measuring import CONTEXT_TOKENS, Bench
from millhand.language.plan import cores_of
from millhand.language.tuning import QUESTIONS, WRITTEN_TOKENS, Tuned, Tuner, changes_of
from millhand.language.way import FOLDER, Way, conditions, read_way
from millhand.proof.document import Proof
from millhand.proof.file import write_proof
from millhand.proof.keys import node_key
from millhand.proof.signature import Keyring, sign
from millhand.workshop.recipe import Target
from millhand.workshop.work import now

if TYPE_CHECKING:
    from millhand.workshop.site import Site

DRAFT_SHARE = 0.5
"""A model drafts only for one with twice its weights or more."""


def prove_way(
    site: Site,
    model: LanguageModel,
    target: Target,
    bench: Bench,
    text: str,
    fresh: bool,
    tell: Callable[[str], None],
) -> tuple[str, ...]:
    """Measure how what serves of a model is served best; returns what came of it, in sentences.

    The proof is kept, and is taken as it is where it still holds. Raises LanguageError, ModelError.
    """
    server, config = bench.server, site.config
    if not isinstance(server, TunableServer):
        return (f"Server {server.name} has one way of serving.",)
    library = open_library(config)
    served = library.served(model, target.name)
    under = conditions(config.language, site.match.profile, site.hardware.cpu.model)
    folder = site.shelf.place(model.name, VERSION, target.name) / FOLDER
    keyring = Keyring(config.node.data_dir, config.models.trusted_keys)
    if not fresh:
        _, _, held = read_way(folder, keyring, served.sha256, server, under)
        if held is not None:
            return (held.reasons[0], *held.notes)
    if target.memory_bytes and 2 * served.path.stat().st_size > target.memory_bytes:
        return ("How it is served best was not tried: two servers do not fit the memory beside each other.",)
    programs = server.programs()
    program = next(iter(programs), "")
    base = Way(
        threads=under["threads"] or (0 if bench.accelerators else cores_of(site.hardware)),
        program=program,
        release=programs.get(program, ""),
        speculation=under["speculation"],
        draft=under["draft"],
        draft_sha256=_sha256(library, under["draft"]) if under["draft"] else "",
        under=under,
    )
    drafts = _drafts(library, model)
    if under["draft"]:
        drafts[under["draft"]] = library.model(under["draft"])
    launch = Launch(
        name=model.name,
        model=served.path,
        port=0,
        context_tokens=CONTEXT_TOKENS,
        accelerators=bench.accelerators,
        kv_bits=under["kv_bits"],
    )
    tuner = Tuner(
        server=server,
        launch=launch,
        drafts={name: found.path for name, found in drafts.items()},
        margin=config.workshop.margin_percent / 100,
        seconds=bench.seconds,
        scratch=bench.scratch,
    )
    hashes = {name: _sha256(library, name) for name in drafts}
    tuned = tuner.tune(base, changes_of(server, base, hashes, under), text, tell)
    return _write(site, model, target, served.sha256, served.path, server.name, tuned, folder)


def _write(
    site: Site, model: LanguageModel, target: Target, sha256: str, path: Path, backend: str, tuned: Tuned, folder: Path
) -> tuple[str, ...]:
    size = path.stat().st_size
    proof = Proof(
        model=model.name,
        version=VERSION,
        target=target.name,
        precision=model.manifest.precision if path == model.path else path.parent.name,
        artifact=path.name,
        sha256=sha256,
        bytes=size,
        source_bytes=size,
        backend=backend,
        options=msgspec.to_builtins(tuned.way),
        executed=True,
        latency=tuned.latency,
        notes=(
            f"Asked: {len(QUESTIONS)} questions, answered greedily in at most {WRITTEN_TOKENS} tokens, side by side.",
            *tuned.tried,
        ),
        passed=True,
        reasons=(tuned.why,),
        node=site.facts(target),
        date=now(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_proof(folder, sign(proof, node_key(site.config.node.data_dir), "node"))
    return (tuned.why, *proof.notes)


def _sha256(library: Library, name: str) -> str:
    return library.model(name).sha256


def _drafts(library: Library, model: LanguageModel) -> dict[str, LanguageModel]:
    """The models here that may draft for another: smaller, with the very same vocabulary."""
    found = {}
    for name in library.names():
        try:
            other = library.model(name)
        except MillhandError:  # whoever looks at that model is told
            continue
        manifest, own = other.manifest, model.manifest
        answers = manifest.format == own.format == "gguf" and not manifest.embeddings
        small = 0 < manifest.parameters <= DRAFT_SHARE * own.parameters
        if name != model.name and answers and small and _vocabulary(other.path) == _vocabulary(model.path):
            found[name] = other
    return found


def _vocabulary(path: Path) -> Sequence[str]:
    """The tokens of a GGUF file, in order. Raises ModelError where the package `gguf` is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("the package 'gguf' is not installed", hint="pip install 'millhand[gguf]'") from error
    tokens: Sequence[str] = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    return tokens
