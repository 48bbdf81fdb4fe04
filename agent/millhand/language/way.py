"""The way in which a language model is served: what was measured on this node to pay, and the proof of it.

`millhand model build` writes it (language/tuning.py); whoever plans a server reads it. It counts only where it was
measured: the same weights, the same program, the same CPU, the same settings of the owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from millhand.errors import ModelError
from millhand.language.launch import Speculation
from millhand.proof.document import PROOF, Proof
from millhand.proof.file import read_proof
from millhand.proof.signature import Keyring, check

if TYPE_CHECKING:
    from millhand.hookspecs import LanguageServer
    from millhand.language.settings import LanguageSettings
    from millhand.profiles import Profile

FOLDER = "way"
"""On the shelf, beside the candidates; no precision is called so."""


class Way(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen of a launch; `options` of the proof."""

    threads: int
    """0 leaves it to the server."""
    program: str
    release: str
    """Of the program, as the server tells it."""
    speculation: Speculation
    draft: str = ""
    """The model that drafts, by name."""
    draft_sha256: str = ""
    under: dict[str, Any]
    """What the owner and the profile had said when it was measured."""

    def __str__(self) -> str:
        drafts = {"none": "no drafts", "draft": f"drafts of '{self.draft}'"}.get(
            self.speculation, f"drafts by {self.speculation}"
        )
        threads = f"{self.threads} threads" if self.threads > 1 else f"{self.threads} thread"
        return ", ".join(part for part in (self.program, threads if self.threads else "", drafts) if part)


def conditions(settings: LanguageSettings, profile: Profile, cpu: str) -> dict[str, Any]:
    """What a way is measured under, and holds under."""
    return {
        "threads": settings.threads or profile.language.threads,
        "speculation": settings.speculation or profile.language.speculation,
        "draft": settings.draft,
        "kv_bits": settings.kv_bits or profile.language.kv_bits,
        "cpu": cpu,
    }


def read_way(
    folder: Path, keyring: Keyring, sha256: str, server: LanguageServer, under: Mapping[str, Any]
) -> tuple[Way | None, str, Proof | None]:
    """(the way, why in a sentence, its proof) of what lies in a folder.

    Where it does not count: (None, why not, None); nothing is said where there is no proof at all. sha256: of the
    weights that are served.
    """
    from millhand.hookspecs import TunableServer

    try:
        proof = read_proof(folder / PROOF)
        way = msgspec.convert(proof.options, Way)
    except FileNotFoundError:
        return None, "", None
    except (ModelError, msgspec.ValidationError) as error:
        return None, f"how it is served best cannot be read: {error}", None
    programs = server.programs() if isinstance(server, TunableServer) else {}
    trust = check(proof, keyring.read()[0])
    refusals = {
        "its proof is not signed by a key that counts": bool(trust.false) or not trust.trusted,
        "it was measured with other weights": proof.sha256 != sha256,
        f"it was measured with {way.release}": proof.backend != server.name or programs.get(way.program) != way.release,
        "it was measured on another CPU, or under other settings": way.under != dict(under),
    }
    for why, holds in refusals.items():
        if holds:
            return None, f"not served as it was measured: {why}; millhand model build {proof.model}", None
    return way, proof.reasons[0], proof
