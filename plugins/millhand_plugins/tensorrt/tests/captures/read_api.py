"""Reads which classes and members TensorRT's Python API has, version by version, into api.json. Names only.

    python read_api.py FOLDER

FOLDER holds the unpacked wheels of NVIDIA's Python bindings, one folder each (`tensorrt_cu12_bindings` 10.3.0,
10.16.1.11 and 11.4.0.106, `tensorrt_rtx_cu13_bindings` 1.7.1.116, all for the interpreter that runs this). They need
native libraries that only a GPU host has, and none of them at the import: libraries with the same names and empty
functions, made here with cc, stand in for them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CLASSES = """
Builder BuilderFlag ComputeCapability CudaGraphStrategy DataType EngineInvalidityDiagnostics EngineValidity ErrorCode
ErrorCodeTRT HardwareCompatibilityLevel IBuilderConfig ICudaEngine IErrorRecorder IExecutionContext IHostMemory ILogger
INetworkDefinition IOptimizationProfile IProgressMonitor IRuntimeCache IRuntimeConfig ITensor ITimingCache
MemoryPoolType NetworkDefinitionCreationFlag OnnxParser ParserError Runtime TensorIOMode
"""
READ = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
found = {}
for name in sys.argv[2].split():
    kind = getattr(trt, name, None)
    if kind is not None:
        members = getattr(kind, "__members__", None)
        names = sorted(member for member in dir(kind) if not member.startswith("_"))
        found[name] = {key: int(value) for key, value in members.items()} if members else names
print(json.dumps([trt.__version__, found]))
"""


def undefined(library: Path) -> list[str]:
    """Functions that a shared object expects of the native libraries."""
    text = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = re.findall(r" U (\w+)$", text.stdout, re.MULTILINE)
    return [
        name for name in names if re.match(r"(create(Infer|NvOnnx)|get(NvOnnx|Infer|Builder|Plugin|Logger)|init)", name)
    ]


def stand_ins(library: Path, folder: Path) -> None:
    """Libraries under the names that a shared object needs, which define what it expects of them."""
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\[(lib(?:nv|tensorrt)[\w]*\.so[.\d]*)\]", text)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in undefined(library)))
    for name in needed:
        command = ["cc", "-shared", "-fPIC", "-w", "-o", str(folder / name), str(source), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)


def read(wheel: Path) -> tuple[str, dict[str, object]]:
    package = next(path for path in wheel.glob("tensorrt*_bindings") if path.is_dir())
    with tempfile.TemporaryDirectory() as name:
        stand_ins(next(package.glob("tensorrt*.so")), Path(name))
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": str(wheel)}
        command = [sys.executable, "-c", READ, package.name, CLASSES]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    version, found = json.loads(answer.stdout)
    return f"{package.name.partition('_bindings')[0].replace('_', '-')} {version}", found


def main() -> None:
    wheels = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    surfaces = dict(read(wheel) for wheel in wheels)
    lines = []
    for version, found in sorted(surfaces.items()):
        classes = ",\n".join(f'  "{name}": {json.dumps(members)}' for name, members in found.items())
        lines.append(f'"{version}": {{\n{classes}\n}}')
    Path(__file__).with_name("api.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
