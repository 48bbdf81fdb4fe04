"""An engine for another GPU must be refused by name: one for compute capability 8.0, on a card that has another.

    python benchmarks/gpu/engine_refused.py [--capability 8.0]

Builds a real engine of the shipped model rig-fault with TensorRT-RTX, as a node without the GPU would, and loads it
through the backend `tensorrt` on the card that is here; then files that are no such engine, which must be refused for
what they are and not for the card. Needs TensorRT-RTX (`pip install 'millhand[tensorrt-rtx]'`), a CUDA driver and
nvidia-ml-py; runs from a source tree (PYTHONPATH=agent:plugins).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from card import Card
from figures import Figure, parser, progress, report

from millhand.errors import MillhandError
from millhand.workshop.recipe import Job, Target
from millhand_plugins import tensorrt
from millhand_plugins.tensorrt.backend import TensorrtBackend
from millhand_plugins.tensorrt.driver import this_gpu
from millhand_plugins.tensorrt.library import RTX, load_library
from millhand_plugins.tensorrt.maker import TensorrtMaker

MODEL = Path(tensorrt.__file__).parents[1] / "rig/models/rig-fault/1/model.onnx"
INPUTS = {"features": ("float32", (-1, 44))}
LEFT_MIB = 1


def build(folder: Path, capability: str) -> Path:
    """An engine for a GPU that is not looked for."""
    target = Target(name=f"sm{capability.replace('.', '')}", accelerator="", compute_capability=capability)
    maker = TensorrtMaker(SimpleNamespace(library=RTX))
    recipe = next(recipe for recipe in maker.recipes(target) if recipe.precision == "fp32")
    keys: dict[str, Any] = {"calibration": {}, "options": {}, "max_batch": 64, "typical_batch": 8}
    job = Job(model=MODEL, folder=folder, target=target, inputs=INPUTS, cache=folder / "cache", **keys)
    return folder / maker.make(recipe, job).artifact


def refusal(path: Path) -> tuple[str, str]:
    """Message and hint of the error that a load ends with; empty where it loads."""
    try:
        session = TensorrtBackend().load(path, "GPU", {"library": RTX})
    except MillhandError as error:
        return error.message, error.hint
    session.close()
    return "", ""


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--capability", default="8.0", help="of the engine")
    capability = arguments.parse_args().capability
    card, gpu = Card(True), this_gpu()
    if gpu.compute_capability == capability:
        raise SystemExit(f"this card has compute capability {capability} itself: its engines run here")
    said: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        path = build(Path(name), capability)
        whole = path.read_bytes()
        refusal(path)  # what CUDA itself takes at its start stays
        before = card.used_mib() or 0.0
        cases = {"other GPU": whole, "cut off": whole[: len(whole) // 2], "other library": b"ftrt" + whole[4:]}
        for case, data in cases.items():
            path.write_bytes(data)
            message, hint = refusal(path)
            said[case] = {"message": message, "hint": hint}
            progress(f"{case}: {message} (try: {hint})")
        left = max(0.0, (card.used_mib() or 0.0) - before)
    words = said["other GPU"]["message"]
    damaged, foreign = "damaged" in said["cut off"]["message"], "another library" in said["other library"]["message"]
    named = "was built for another GPU" in words and gpu.compute_capability in words and capability in words
    figures = [
        Figure("engine for another GPU: refused, both GPUs named", int(named), "1", "== 1"),
        Figure("engine cut off: refused as damaged", int(damaged), "1", "== 1"),
        Figure("other library: refused as such", int(foreign), "1", "== 1"),
        Figure("GPU memory that is left", round(left, 1), "MiB", f"<= {LEFT_MIB}"),
    ]
    facts = {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "driver": gpu.driver}
    return report("gpu_engine_refused", figures, card=card.facts, gpu=facts, said=said, library=load_library(RTX).title)


if __name__ == "__main__":
    sys.exit(main())
