"""llama.cpp's server inside xllamacpp, in its own process: `python -m millhand_plugins.llamacpp.serve '<JSON>'`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import msgspec

API_KEY = "LLAMA_API_KEY"
"""The variable that a native server reads its key from, too."""
CHECK_TENSORS_BYTES_CAP = 256 << 20
"""Smaller files are looked through for values that are not finite, which takes a fraction of a second."""


class Serving(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is served, and how."""

    model: str
    alias: str
    port: int
    context_tokens: int
    """All slots' together."""
    slots: int
    threads: int
    batch_tokens: int
    cache_type: str
    prompt_cache_mib: int
    speculation: str
    """As llama.cpp names it: `ngram-map-k`; empty for none."""
    draft: str
    """The file of the smaller model; empty for none."""
    embeddings: bool


def main() -> None:
    """Serve until SIGTERM. Exits with 1 where the model cannot be loaded or the port cannot be bound."""
    serving = msgspec.json.decode(sys.argv[1], type=Serving)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    import xllamacpp

    try:
        server = xllamacpp.Server(_parameters(xllamacpp, serving))
    except RuntimeError as error:
        print(f"error: '{serving.model}' cannot be served: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
    print(f"serving at {server.listening_address}", file=sys.stderr, flush=True)  # noqa: T201
    while True:
        signal.pause()


def _parameters(library: Any, serving: Serving) -> Any:
    params = library.CommonParams()
    params.model.path = serving.model
    params.model_alias = {serving.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = serving.port
    params.n_ctx = serving.context_tokens
    params.n_parallel = serving.slots
    params.n_batch = serving.batch_tokens
    params.n_ubatch = min(params.n_ubatch, serving.batch_tokens)
    params.cache_ram_mib = serving.prompt_cache_mib
    cache_type = getattr(library.ggml_type, f"GGML_TYPE_{serving.cache_type.upper()}")
    params.cache_type_k = params.cache_type_v = cache_type
    if serving.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = serving.threads
    if serving.speculation:
        name = serving.speculation.upper().replace("-", "_")
        params.speculative.types = [getattr(library.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{name}")]
    if serving.draft:
        params.speculative.draft.mparams.path = serving.draft
    if serving.embeddings:
        params.embedding = True
    params.check_tensors = os.path.getsize(serving.model) < CHECK_TENSORS_BYTES_CAP  # noqa: PTH202
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.cors_origins = "localhost"  # pages of other hosts in a browser here must not ask it
    if key := os.environ.pop(API_KEY, ""):
        params.api_keys = [key]
    params.offline = True
    params.ui = False
    params.verbosity = 2  # warnings and errors
    return params


if __name__ == "__main__":
    main()
