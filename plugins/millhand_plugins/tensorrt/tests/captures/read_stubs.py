"""Reads which parameters TensorRT's calls take, as the package `tensorrt-stubs` has them, into stubs.json. Names only.

    python read_stubs.py FOLDER

FOLDER holds the unpacked wheel (`pip download --no-deps tensorrt-stubs==10.13.0.35.1`). It must not be installed where
millhand is: its folder `tensorrt` would be taken for the library. Some of its signatures are no Python: a parameter
that must be given stands behind one that need not be, or is named by a keyword. There default values are dropped, and
the name gets an underscore, so that the file can be parsed.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import sys
from pathlib import Path

VERSION = "10.13.0.35"
CLASSES = """
Builder IBuilderConfig ICudaEngine IExecutionContext INetworkDefinition IOptimizationProfile ITensor ITimingCache
OnnxParser ParserError Runtime
"""


def parsed(text: str) -> ast.Module:
    """The stub's tree. Raises SyntaxError where a line is wrong in another way."""
    lines = text.splitlines()
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            number = (error.lineno or 0) - 1
            if "non-default argument" in str(error):
                mended = re.sub(r" = [^,)]+", "", lines[number])
            else:
                mended = re.sub(rf"\b({'|'.join(keyword.kwlist)}): ", r"\1_: ", lines[number])
            if mended == lines[number] or not mended.lstrip().startswith("def "):
                raise
            lines[number] = mended


def parameters(node: ast.FunctionDef) -> dict[str, bool]:
    """Name -> whether it must be given, in order."""
    positional = [*node.args.posonlyargs, *node.args.args][1:]
    must = len(positional) - len(node.args.defaults)
    return {argument.arg: place < must for place, argument in enumerate(positional)}


def members(kind: ast.ClassDef) -> dict[str, list[dict[str, bool]]]:
    """Public member -> the parameters of each of its overloads; of what is no call there is none."""
    found: dict[str, list[dict[str, bool]]] = {}
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = []
        elif isinstance(node, ast.FunctionDef):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            calls = found.setdefault(node.name, [])
            if not any(mark == "property" or mark.endswith(".setter") for mark in marks):
                calls.append(parameters(node))
    return {name: calls for name, calls in sorted(found.items()) if not name.startswith("_")}


def main() -> None:
    tree = parsed((Path(sys.argv[1]) / "tensorrt_bindings" / "tensorrt.pyi").read_text())
    kinds = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = ",\n".join(f'"{name}": {json.dumps(members(kinds[name]))}' for name in CLASSES.split())
    Path(__file__).with_name("stubs.json").write_text(f'{{\n"version": "{VERSION}",\n{lines}\n}}\n')


if __name__ == "__main__":
    main()
