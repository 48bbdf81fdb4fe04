"""The table `[plugins.llamacpp]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from millhand.validation import StrictTable


class LlamacppSettings(StrictTable):
    use: Literal["auto", "native", "xllamacpp"] = "auto"
    """`native`: a llama-server of your own; `xllamacpp`: the one inside the Python package. `auto` takes a native one
    where there is one: it is built for the machine, and may use its GPU."""
    binary: Path = Path("llama-server")
    """The native server: a path, or a name to look for on PATH."""
    batch_tokens: int = Field(default=512, ge=32, le=8192)
    """Tokens of a prompt that are computed at once. More is faster on a GPU; while they are computed nobody else is
    answered."""
    prompt_cache_mib: int = Field(default=256, ge=0)
    """Main memory for prompts that were seen: the same beginning is not read again. llama.cpp's own default is 8192."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the native server, which win over ours."""
