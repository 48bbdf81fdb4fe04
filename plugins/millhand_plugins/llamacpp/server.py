"""How llama.cpp's server is started, and what it tells."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Ability, Command, Launch, ServerFigures, Speculation
from millhand.language.samples import read_samples
from millhand_plugins.llamacpp.settings import LlamacppSettings

SERVE = "millhand_plugins.llamacpp.serve"
API_KEY = "LLAMA_API_KEY"
"""llama.cpp's own variable for the key (common/arg.cpp, `--api-key`)."""
GGUF = b"GGUF"
CACHE_TYPES = {16: "f16", 8: "q8_0", 4: "q4_0"}
SPECULATIONS: Mapping[Speculation, str] = {
    "ngram": "ngram-map-k",
    "ngram-simple": "ngram-simple",
    "ngram-mod": "ngram-mod",
    "ngram-cache": "ngram-cache",
    "draft": "draft-simple",
}
"""As llama.cpp names them (`--spec-type`)."""
NATIVE, XLLAMACPP = "native", "xllamacpp"


class LlamacppServer:
    """Implements `TunableServer`."""

    name = "llamacpp"
    formats: Sequence[str] = ("gguf",)
    abilities: frozenset[Ability] = frozenset({
        "chat", "completions", "embeddings", "json_schema", "tools", "logprobs", "seed", "stop", "usage", "reasoning",
        "text_bias",
    })  # fmt: skip
    speculations: Sequence[Speculation] = tuple(SPECULATIONS)

    def __init__(self, settings: LlamacppSettings) -> None:
        self._settings = settings

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        use = self._settings.use
        if use != "xllamacpp" and self._binary() is not None:
            return ""
        if use == "native":
            return f"no llama-server at '{self._settings.binary}': build llama.cpp, or set [plugins.llamacpp] binary"
        if importlib.util.find_spec("xllamacpp") is None:
            return "neither a llama-server on PATH nor the package xllamacpp: pip install 'millhand[language]'"
        return ""

    def programs(self) -> Mapping[str, str]:
        """A native server by its file, which another build of it replaces."""
        found = {}
        use, binary = self._settings.use, self._binary()
        if use != XLLAMACPP and binary is not None:
            state = Path(binary).stat()
            found[NATIVE] = f"{binary}, {state.st_size} bytes of {state.st_mtime_ns}"
        if use != NATIVE and importlib.util.find_spec("xllamacpp") is not None:
            found[XLLAMACPP] = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        return found

    def command(self, launch: Launch) -> Command:
        """The native server where there is one, else ours around xllamacpp.

        Raises ModelError where the file is no GGUF, ConfigError where several GPUs are asked of xllamacpp.
        """
        _require_gguf(launch.model)
        binary = None if XLLAMACPP in (self._settings.use, launch.program) else self._binary()
        if binary is not None:
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(launch.accelerators), **_key(launch)}
            return Command((binary, *self._arguments(launch)), environment, f"a native server: {binary}")
        if len(launch.accelerators) > 1:
            raise ConfigError(
                f"[language] tensor_parallel = {len(launch.accelerators)}, but xllamacpp computes on the CPU",
                hint="put a llama-server that was built with CUDA on PATH",
            )
        note = "xllamacpp, on the CPU" + ("; a llama-server on PATH could use the GPU" if launch.accelerators else "")
        return Command(
            (sys.executable, "-m", SERVE, self._told(launch)), {"CUDA_VISIBLE_DEVICES": "", **_key(launch)}, note
        )

    def figures(self, metrics: str) -> ServerFigures:
        """From llama.cpp's page; it does not tell of its KV cache."""
        found = read_samples(metrics)
        return ServerFigures(
            running=found.get("llamacpp:requests_processing"),
            waiting=found.get("llamacpp:requests_deferred"),
            prompt_tokens=found.get("llamacpp:prompt_tokens_total"),
            generated_tokens=found.get("llamacpp:tokens_predicted_total"),
            steps=found.get("llamacpp:n_decode_total"),
        )

    def _binary(self) -> str | None:
        return shutil.which(os.fspath(self._settings.binary))

    def _arguments(self, launch: Launch) -> list[str]:
        settings, cache = self._settings, CACHE_TYPES[launch.kv_bits]
        values: Mapping[str, object] = {
            "--model": launch.model,
            "--alias": launch.name,
            "--host": "127.0.0.1",
            "--port": launch.port,
            "--ctx-size": launch.context_tokens * launch.slots,  # the slots share it
            "--parallel": launch.slots,
            "--batch-size": settings.batch_tokens,
            "--cache-type-k": cache,
            "--cache-type-v": cache,
            "--cache-ram": settings.prompt_cache_mib,
            "--reasoning-format": "deepseek",
        }
        flags = ["--metrics", "--no-webui", "--jinja", "--offline"]
        if launch.threads:
            values = {**values, "--threads": launch.threads}
        if launch.speculation != "none":
            values = {**values, "--spec-type": SPECULATIONS[launch.speculation]}
        if launch.draft is not None:
            values = {**values, "--model-draft": launch.draft}
        if launch.embeddings:
            flags.append("--embeddings")
        return [*(str(word) for pair in values.items() for word in pair), *flags, *settings.arguments]

    def _told(self, launch: Launch) -> str:
        """What `serve` is told: `Serving`, as JSON."""
        from millhand_plugins.llamacpp.serve import Serving

        serving = Serving(
            model=os.fspath(launch.model),
            alias=launch.name,
            port=launch.port,
            context_tokens=launch.context_tokens * launch.slots,
            slots=launch.slots,
            threads=launch.threads,
            batch_tokens=self._settings.batch_tokens,
            cache_type=CACHE_TYPES[launch.kv_bits],
            prompt_cache_mib=self._settings.prompt_cache_mib,
            speculation=SPECULATIONS.get(launch.speculation, ""),
            draft="" if launch.draft is None else os.fspath(launch.draft),
            embeddings=launch.embeddings,
        )
        return msgspec.json.encode(serving).decode()


def _key(launch: Launch) -> dict[str, str]:
    return {API_KEY: launch.api_key} if launch.api_key else {}


def _require_gguf(path: Path) -> None:
    """Raises ModelError where the file cannot be read, or is of another kind; the rest the server itself finds."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF))
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="check its permissions") from error
    if magic != GGUF:
        raise ModelError(f"'{path}' is no GGUF file: it begins with {magic!r}", hint="add the model again")
