"""Builds a TensorRT-RTX engine of every shipped model in fp32, fp16, int8 and int4, for A30 and A100, on this CPU.

    python benchmarks/tensorrt_build.py [--rounds 5] [--target 8.0]

Each build is a process of its own, as in the workshop: what is timed is the job, from the ONNX file to the engine on
disk, the library's import included; the interpreter's start is not. The fp16, int8 and int4 files come from the plugin
quantize, calibrated in haste: how accurate they are is of no matter here. Needs `pip install 'millhand[tensorrt-rtx]'`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins/millhand_plugins/tensorrt/tests/kit"))

from figures import Figure, parser, progress, report
from trt_nets import SHIPPED, SOURCES, model_name, quantised, specs

GOAL_S = 5
JOB = """
import json, sys, time
from pathlib import Path
from millhand.workshop.recipe import Job, Target
from millhand_plugins.tensorrt.library import load_library
from millhand_plugins.tensorrt.maker import TensorrtMaker
from millhand_plugins.tensorrt.settings import TensorrtSettings
source, folder, capability, precision, inputs = sys.argv[1:]
target = Target(name="sm" + capability.replace(".", ""), accelerator="", compute_capability=capability)
maker = TensorrtMaker(TensorrtSettings(library="tensorrt-rtx"))
recipe = next(recipe for recipe in maker.recipes(target) if recipe.precision == precision)
specs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in json.loads(inputs).items()}
steps = []
job = Job(model=Path(source), folder=Path(folder), target=target, inputs=specs, calibration={}, max_batch=64,
          typical_batch=8, options={}, cache=Path(folder) / "cache", progress=lambda share, step: steps.append(share))
began = time.perf_counter()
made = maker.make(recipe, job)
seconds = time.perf_counter() - began
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(json.dumps({"seconds": seconds, "bytes": (Path(folder) / made.artifact).stat().st_size, "peak_kib": peak,
                  "steps": len(steps), "version": load_library("tensorrt-rtx").version}))
"""


def build(source: Path, precision: str, capability: str) -> dict[str, float | str]:
    """One build in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", JOB, str(source), folder, capability, precision, json.dumps(specs(source))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise SystemExit(f"{source}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float | str] = json.loads(done.stdout)
    return found


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--target", default="8.0", help="compute capability")
    options = arguments.parse_args()
    figures, version = [], ""
    with tempfile.TemporaryDirectory() as name:
        for shipped in SHIPPED:
            model = model_name(shipped)
            for precision in ("fp32", *SOURCES):
                source = quantised(shipped, Path(name) / f"{model}-{precision}", precision)
                rounds = [build(source, precision, options.target) for _ in range(options.rounds)]
                seconds = [float(one["seconds"]) for one in rounds]
                version = str(rounds[0]["version"])
                label = f"{model} {precision}"
                progress(f"{label}: {min(seconds):.2f} to {max(seconds):.2f} s")
                figures += [
                    Figure(f"{label}: build, slowest of {len(rounds)}", round(max(seconds), 2), "s", f"<= {GOAL_S}"),
                    Figure(f"{label}: build, median", round(statistics.median(seconds), 2), "s"),
                    Figure(f"{label}: ONNX file", source.stat().st_size, "byte"),
                    Figure(f"{label}: engine", rounds[0]["bytes"], "byte"),
                    Figure(f"{label}: memory of the process, peak", round(float(rounds[0]["peak_kib"]) / 1024), "MiB"),
                ]
    cores = len(os.sched_getaffinity(0))
    return report("tensorrt_build", figures, library=f"TensorRT-RTX {version}", target=options.target, cores=cores)


if __name__ == "__main__":
    sys.exit(main())
