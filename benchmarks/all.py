"""Run every benchmark and keep what it printed last under benchmarks/results/<name>.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

HERE = Path(__file__).parent
SCRIPTS: list[tuple[str, list[str]]] = [
    ("footprint", ["footprint.py"]),
    ("pipeline", ["pipeline.py"]),
    ("worker_protocol", ["worker_protocol.py"]),
    ("hot_path", ["hot_path.py"]),
    ("ensemble", ["ensemble.py"]),
    ("proof", ["proof.py"]),
    ("quantize", ["quantize.py", "--forms"]),
    ("workshop_build", ["workshop_build.py"]),
    ("language_precisions", ["language_precisions.py"]),
    ("serving", ["serving.py", "--peers"]),
    ("serving_ablation", ["serving.py", "--ablation"]),
    ("soak_serving", ["soak_serving.py"]),
    ("language_gateway", ["language_gateway.py"]),
    ("guard", ["eval/guard.py", "--no-speed"]),
    ("guard_speed", ["eval/guard.py", "--only-speed", "--megabytes", "1"]),
    ("rig", ["eval/rig.py"]),
    ("rig_wave", ["eval/rig.py", "--model", "rig-wave"]),
    ("orders", ["eval/orders.py"]),  # judges anew what the model wrote once
]
SUBSETS = ("FD001", "FD002", "FD003", "FD004")


def main() -> int:
    scripts = list(SCRIPTS)
    data = os.environ.get("MILLHAND_DATA")
    if data:
        folder = str(Path(data) / "cmapss")
        scripts += [
            (f"cmapss_{name.lower()}", ["eval/cmapss.py", "--subset", name, "--data", folder]) for name in SUBSETS
        ]
    else:
        print("MILLHAND_DATA is not set: the C-MAPSS evaluations are left out", file=sys.stderr)
    if Path("/dev/nvidia0").exists():
        scripts += [(f"gpu_{name}", [f"gpu/{name}.py"]) for name in ("serving", "engines", "many", "transfer")]
    else:
        print("there is no NVIDIA GPU here: gpu_serving, _engines, _many and _transfer are left out", file=sys.stderr)
    if find_spec("tensorrt_rtx_bindings"):
        scripts.append(("tensorrt_build", ["tensorrt_build.py"]))
    else:
        print("TensorRT-RTX is not installed: tensorrt_build is left out", file=sys.stderr)
    if os.geteuid() == 0 and which("buildah"):
        scripts.append(("image_size", ["image_size.py"]))
    else:
        print("not root, or buildah is not installed: image_size is left out", file=sys.stderr)
    failed = []
    for name, command in scripts:
        print(f"== {name}", flush=True)
        path, *arguments = command
        run = subprocess.run(
            [sys.executable, str(HERE / path), *arguments], stdout=subprocess.PIPE, text=True, check=False
        )
        print(run.stdout)
        lines = run.stdout.strip().splitlines()
        if lines and lines[-1].startswith("{"):
            text = json.dumps(json.loads(lines[-1]), indent=2) + "\n"
            (HERE / "results" / f"{name}.json").write_text(text)
        if run.returncode:
            failed.append(name)
    if failed:
        print(f"goals missed or runs failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
