"""`millhand model prove` of a language model: its own file measured alone on this node, and signed.

Like every own artifact's, the proof lies on the shelf. A batch of 1 is a token that is written, a batch of more a
prompt of so many tokens that is read.
"""

from __future__ import annotations

from pathlib import Path

from millhand.errors import InputError, ModelError
from millhand.language.library import VERSION, LanguageModel, own_subject
from millhand.language.measuring import held_text, open_bench
from millhand.language.precisions import own_target, package_versions, source_digest
from millhand.proof.document import Latency, Proof, Score
from millhand.proof.file import write_proof
from millhand.proof.keys import node_key
from millhand.proof.signature import sign
from millhand.workshop.listener import Listener
from millhand.workshop.metric import PERPLEXITY
from millhand.workshop.site import Site
from millhand.workshop.work import now

SPEED_SHARE = 0.3
"""Of the time that a proof takes, for the bar; the rest is perplexity."""


def prove_language_model(
    site: Site, model: LanguageModel, listener: Listener, *, target: str | None = None, data: Path | None = None
) -> Proof:
    """Measure size, tokens/s, memory and perplexity of a model as it is, and sign.

    data: the owner's text. Raises MillhandError where it cannot be measured: another form than GGUF, no server, a
    changed file, a text that is too short.
    """
    _check(site, model, target)
    source_digest(model)
    folder = site.shelf.original(model.name, VERSION)
    here = own_target(site)
    try:
        with site.shelf.claimed(model.name), site.shelf.scratch(model.name, VERSION, here.name) as scratch:
            measured = _measured(site, model, listener, scratch, data)
            proof = sign(measured, node_key(site.config.node.data_dir), "node")
            folder.mkdir(parents=True, exist_ok=True)
            write_proof(folder, proof)
            return proof
    except OSError as error:
        raise site.shelf.unwritable(error) from error


def _check(site: Site, model: LanguageModel, target: str | None) -> None:
    if model.manifest.format != "gguf" or model.manifest.embeddings:
        what = "embeds" if model.manifest.embeddings else f"is in the form '{model.manifest.format}'"
        raise ModelError(
            f"language model '{model.name}' {what}: GGUF files of models that answer are measured",
            hint=f"millhand model add {model.name} SOURCE --precision F16 --replace",
        )
    here = own_target(site).name
    if target not in (None, here):
        raise InputError(f"--target {target}: language models serve on '{here}' here", hint="leave --target out")


def _measured(site: Site, model: LanguageModel, listener: Listener, scratch: Path, data: Path | None) -> Proof:
    target, text = own_target(site), held_text(data)
    bench = open_bench(site, target, scratch)
    listener.progress(model.name, 0.0, "measuring speed")
    latency, memory_bytes = bench.speed_alone(model.path, text.text)

    def tell(share: float) -> None:
        listener.progress(model.name, SPEED_SHARE + (0.99 - SPEED_SHARE) * share, "perplexity")

    perplexity, tokens = bench.perplexity(model.path, text.text, tell)
    subject = own_subject(model, site.shelf)
    return Proof(
        model=model.name,
        version=VERSION,
        target=target.name,
        precision=model.manifest.precision,
        artifact=subject.artifact,
        sha256=subject.digest(),
        bytes=model.weights_bytes,
        source_bytes=model.weights_bytes,
        backend=bench.server.name,
        executed=True,
        score=_score(site, perplexity, tokens, text.source),
        latency=latency,
        memory_bytes=memory_bytes,
        original_memory_bytes=memory_bytes,
        notes=(_speed_note(latency),),
        passed=True,
        reasons=(f"It answered on this node; its perplexity on {tokens} tokens is {perplexity:.4g}.",),
        node=site.facts(target),
        versions=package_versions(),
        date=now(),
    )


def _score(site: Site, perplexity: float, tokens: int, source: str) -> Score:
    return Score(
        metric=PERPLEXITY,
        higher_is_better=False,
        original=perplexity,
        candidate=perplexity,
        drop_percent=0.0,
        limit_percent=site.config.workshop.drop_percent_cap,
        rows=tokens,
        data=source,
    )


def _speed_note(latency: tuple[Latency, Latency]) -> str:
    one, many = latency
    return (
        f"{1e3 / one.p50_ms:.3g} tokens/s written and {1e3 * many.batch / many.p50_ms:.3g} read: a batch of 1 is a "
        f"token that is written, one of {many.batch} a prompt that is read."
    )
