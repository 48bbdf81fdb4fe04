"""What TensorRT says when it fails, in words that name the node and the remedy. Python 3.10.

The texts that are looked for are those of TensorRT-RTX 1.7.1 and TensorRT 10 and 11. One that is not known is passed on
as it is, with a general remedy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from millhand.errors import ModelError
from millhand_plugins.tensorrt.library import Library

SHOWN_CHARACTERS = 400
NOISE = re.compile(r"catchCudaError")
"""A second line that follows any error where there is no driver; it says nothing of the first."""
PLACE = re.compile(r"\s*In \w+ at /\S+?(?=[\s)]|$)")
"""A place in TensorRT's own source."""
WRAPPED = re.compile(r"^.*?Error Code \d+: (?:[\w /]+\((?P<inner>.*)\)$|(?P<plain>.+))")
HEADING = re.compile(r"^(?:Invalid Node|In node -?\d+)")
"""A line that says no more than that something follows."""
MEMORY = re.compile(
    r"bad_alloc|out of memory|FAILED_ALLOCATION|MEM_ALLOC_FAILED|cannot allocate|insufficient memory|"
    r"Resource temporarily unavailable|Requested amount of GPU memory",
    re.IGNORECASE,
)
UNKNOWN_OPERATOR = re.compile(r"Plugin not found|not found in plugin registry|No importer registered|^false$")
NO_FILE = re.compile(r"Failed to open file: *(?P<file>.+)")
INITIALIZER = re.compile(r"Failed to import initializer: (?P<name>(?!In node).+)$", re.MULTILINE)
MEMORY_HINT = "free memory (unload models, stop other programs), or lower max_batch or workspace_bytes_cap"

REMEDIES = (
    (MEMORY, MEMORY_HINT),
    (re.compile(r"workspace limit|insufficient workspace", re.I), "raise [plugins.tensorrt] workspace_bytes_cap"),
    (re.compile(r"Unable to load library"), "set [plugins.tensorrt] version_compatible = false"),
    (
        re.compile(r"driver version is insufficient|no CUDA-capable device|cudaErrorNoDevice", re.I),
        "install or update the NVIDIA driver (nvidia-smi), or build for a target elsewhere with --target",
    ),
    (
        re.compile(r"zero.?point|shiftIsAllZeros", re.I),
        "quantise with zero points of 0, as the recipes int8-qdq and int4-qdq do",
    ),
    (
        re.compile(r"same (?:input )?types?|strongly.?typed|is of type", re.I),
        "the file mixes types, and TensorRT converts none by itself: convert the whole model, or insert Cast nodes",
    ),
    (
        re.compile(r"ONNX (?:data|date) type|UNSUPPORTED_NODE_DATATYPE|STRING", re.I),
        "TensorRT knows float, half, int8, int32, int64, uint8 and bool: change the tensor's type, or use onnxruntime",
    ),
    (
        re.compile(r"whole blocks|ScaleMode", re.I),
        "quantise in blocks that divide the rows of the weights, at least two of them; the recipe int4-qdq does",
    ),
    (
        re.compile(r"must match|dimensions? (?:of|mismatch)", re.I),
        "the shapes in the file do not fit together: look at it with onnx.checker, and export it again",
    ),
    (re.compile(r"could not find any implementation", re.I), "raise workspace_bytes_cap or optimization_level"),
    (re.compile(r"optimization profile", re.I), "set [plugins.tensorrt.ranges] for the free dimensions"),
)
GENERAL_HINT = "serve the model with the backend onnxruntime, or export it without this part"


def brief(text: str) -> str:
    """The first line that says something, without the places in TensorRT's own source."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not NOISE.search(line)]
    telling = [line for line in lines if not HEADING.match(line)] or lines or [""]
    shown = PLACE.sub("", telling[0])
    found = WRAPPED.match(shown)
    if found:
        shown = found["inner"] or found["plain"]
    return shown.strip()[:SHOWN_CHARACTERS]


def parse_fault(file: str, library: Library, errors: Sequence[Any], said: Sequence[str]) -> ModelError:
    """Why a parser refused a file. errors: its ParserErrors; said: what it logged."""
    told = "\n".join(said)
    missing = NO_FILE.search(told)
    texts = [str(error.desc()) for error in errors]
    if missing:
        named = next((found["name"] for text in texts if (found := INITIALIZER.search(text))), "")
        of = f" of initializer '{named}'" if named else ""
        return ModelError(
            f"'{file}': the external data{of} is missing: '{missing['file'].strip()}' cannot be opened",
            hint="put the data file beside the model under the name that it was exported with",
        )
    if not errors:
        return ModelError(
            f"'{file}' was refused by {library.title}: {brief(told) or 'without a word'}", hint=GENERAL_HINT
        )
    error, text = errors[0], texts[0]
    code = str(getattr(error.code(), "name", error.code()))
    where = _where(error)
    if MEMORY.search(text) or code == "MEM_ALLOC_FAILED":
        return ModelError(f"'{file}'{where}: the memory does not suffice to read it: {brief(text)}", hint=MEMORY_HINT)
    if code == "MODEL_DESERIALIZE_FAILED":
        return ModelError(f"'{file}' is no ONNX model, or is not whole", hint="copy or export it again")
    operator = str(error.node_operator())
    if operator and UNKNOWN_OPERATOR.search(text):
        return ModelError(
            f"'{file}'{where}: {library.title} has no operator '{operator}'",
            hint=f"export the model without {operator}, or serve it with the backend onnxruntime",
        )
    if not where and str(error.func()) == "importInput":
        where = f", input '{error.file()}'"
    return ModelError(f"'{file}'{where}: {brief(text)}", hint=remedy(f"{code} {text}"))


def _where(error: Any) -> str:
    name, operator, number = str(error.node_name()), str(error.node_operator()), int(error.node())
    if not name and number < 0:
        return ""
    return f", node '{name or number}'" + (f" ({operator})" if operator else "")


def build_fault(file: str, library: Library, errors: Sequence[tuple[str, str]], said: Sequence[str]) -> ModelError:
    """Why a build failed. errors: codes and texts of the error recorder; said: what was logged."""
    texts = [f"{code} {text}" for code, text in errors if not NOISE.search(text)] or list(said)
    if any(MEMORY.search(text) for text in texts):
        shown = next(text for text in texts if MEMORY.search(text))
        return ModelError(
            f"'{file}': the memory does not suffice to build the engine: {_plain(shown)}", hint=MEMORY_HINT
        )
    shown = texts[0] if texts else "no reason was given"
    return ModelError(f"'{file}': {library.title} built no engine: {_plain(shown)}", hint=remedy(shown))


def _plain(text: str) -> str:
    """Without the code's name in front."""
    return brief(re.sub(r"^[A-Z_]+ ", "", text))


def remedy(text: str) -> str:
    """What to do about it."""
    told = "\n".join(line for line in text.splitlines() if not NOISE.search(line))
    return next((hint for pattern, hint in REMEDIES if pattern.search(told)), GENERAL_HINT)
