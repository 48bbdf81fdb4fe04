"""Evidence that a session runs where it was told to: what its nodes ran on, and whether its answer is the CPU's.

Runs in workers: Python 3.10. The profile is ONNX Runtime's own (`SessionOptions.enable_profiling`): a JSON list of
events in the trace event format of Chrome; each node that ran has one of category `Node`, whose name ends in
`_kernel_time` and whose `args` name operator and provider.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand.serving.tensors import Specs, Tensors, zeros
from millhand_plugins.onnxruntime.providers import CPU_PROVIDER

# Convolutions keep one plan, that of the last shape (ONNX Runtime 1.20 to 1.31).
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"})
# Where nearly all the time goes: one of these on the CPU means that the GPU does not pay.
HEAVY = CONVOLUTIONS | {
    "ConvInteger", "QLinearConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits",
    "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "LSTM", "GRU", "RNN", "Attention",
    "MultiHeadAttention", "GroupQueryAttention", "QAttention", "DynamicQuantizeLSTM",
}  # fmt: skip
COPIES = ("MemcpyFromHost", "MemcpyToHost")
# Largest difference allowed, as a share of the largest value of the tensor. float32 sums in another order differ by
# 1e-6 to 1e-5, also through many layers; float16 and TF32 have 11 bits of mantissa, 5e-4 an operation.
TOLERANCE = 1e-3
HALF_TOLERANCE = 3e-2
SCALE_FLOOR = 1e-3
NAMED_NODES = 5
SEED = 7
EXAMPLES = 2


@dataclass(frozen=True)
class NodeRun:
    """One node that ran."""

    name: str
    operator: str
    provider: str
    half: bool
    """Whether a float16 or bfloat16 tensor went in or came out."""

    @property
    def accelerated(self) -> bool:
        return self.provider != CPU_PROVIDER


def read_profile(path: Path) -> list[NodeRun]:
    """The nodes that ran, in order, without copies to and from the GPU. Raises ModelError where it cannot be read."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        nodes = [_node(event) for event in events if _is_kernel(event)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"ONNX Runtime's profile '{path}' cannot be read: {type(error).__name__}: {error}",
            hint="check that the worker's temporary folder can be written, or report this with ONNX Runtime's version",
        ) from error
    return [node for node in nodes if node.operator not in COPIES]


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _node(event: Mapping[str, Any]) -> NodeRun:
    arguments = event["args"]
    types = [
        name
        for key in ("input_type_shape", "output_type_shape")
        for tensor in arguments.get(key, ())
        for name in tensor
    ]
    return NodeRun(
        name=event["name"][: -len("_kernel_time")],
        operator=arguments["op_name"],
        provider=arguments["provider"],
        half=any(name in ("float16", "bfloat16") for name in types),
    )


def check_nodes(artifact: str, nodes: list[NodeRun], first: str) -> dict[str, Any]:
    """What ran where. first: the provider that was asked for first, by ONNX Runtime's name.

    Raises ModelError where it ran nothing, or what is heavy ran on the CPU.
    """
    fast = [node for node in nodes if node.accelerated]
    cpu = [node for node in nodes if not node.accelerated]
    heavy = [node for node in cpu if node.operator in HEAVY]
    if heavy:
        raise ModelError(
            f"'{artifact}': the nodes that cost most ran on the CPU, not on {first}: {_named(heavy)}",
            hint="the provider has no kernel for them: take a float32 or float16 artifact, or set providers = ['cpu']",
        )
    if not any(node.provider == first for node in nodes):
        others = f"; {_named(nodes)} ran on {', '.join(_providers(nodes))}" if nodes else ""
        raise ModelError(
            f"'{artifact}': none of its {len(nodes)} nodes ran on {first}{others}",
            hint="take that provider out of the model's `providers`"
            if fast
            else "set providers = ['cpu'] for this model",
        )
    return {
        "provider": first,
        "providers": _providers(nodes),
        "nodes": len(nodes),
        "gpu_nodes": len(fast),
        "gpu_share": round(len(fast) / len(nodes), 4),
        "cpu_nodes": [f"{node.name} ({node.operator})" for node in cpu],
    }


def _providers(nodes: list[NodeRun]) -> dict[str, int]:
    """Provider -> how many nodes ran there."""
    return dict(Counter(node.provider for node in nodes))


def _named(nodes: list[NodeRun]) -> str:
    shown = ", ".join(f"'{node.name}' ({node.operator})" for node in nodes[:NAMED_NODES])
    return shown + (f" and {len(nodes) - NAMED_NODES} more" if len(nodes) > NAMED_NODES else "")


def examples(specs: Specs) -> dict[str, NDArray[Any]]:
    """Two rows for every input, the same at each call: normal floats, integers 0 and 1 (valid as indices), texts "0".

    Free dimensions beside the batch get size 1, as in a warm-up.
    """
    random = np.random.default_rng(SEED)
    arrays: dict[str, NDArray[Any]] = {}
    for name, array in zeros(specs, EXAMPLES).items():
        if array.dtype.kind == "f":
            arrays[name] = random.standard_normal(array.shape).astype(array.dtype)
        elif array.dtype.kind == "O":
            arrays[name] = np.full(array.shape, b"0", dtype=object)
        else:
            arrays[name] = random.integers(0, 2, array.shape).astype(array.dtype)
    return arrays


def difference(expected: Tensors, found: Tensors) -> float:
    """The largest difference, as a share of its tensor's largest value; infinite for another shape, or NaN elsewhere.

    Integers count only where the model gives nothing else: a tie may fall either way.
    """
    floats = {name: array for name, array in expected.items() if array.dtype.kind == "f"}
    if not floats:
        equal = all(np.array_equal(array, found[name]) for name, array in expected.items())
        return 0.0 if equal else float("inf")
    return max(_tensor_difference(array, found[name]) for name, array in floats.items())


def _tensor_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    finite = np.isfinite(expected)
    if expected.shape != found.shape or not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    if not finite.any():
        return 0.0
    reference = expected[finite].astype(np.float64)
    scale = max(float(np.abs(reference).max()), SCALE_FLOOR)
    return float(np.abs(reference - found[finite].astype(np.float64)).max()) / scale


def check_answer(artifact: str, expected: Tensors, found: Tensors, tolerance: float, rows: int) -> float:
    """Return the difference between two answers. Raises ModelError where it exceeds `tolerance`."""
    largest = difference(expected, found)
    if not largest <= tolerance:
        raise ModelError(
            f"'{artifact}': in a batch of {rows}, the answer to a test input differs from the CPU's by "
            f"{largest:.2g} of the largest value, allowed is {tolerance:g}",
            hint="set tf32 = false, or a higher precision in provider_options; else report this with the model, or set "
            "providers = ['cpu']",
        )
    return largest


def check_finite(artifact: str, found: Tensors) -> None:
    """For a model that the CPU cannot run. Raises ModelError for NaN and infinity."""
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelError(
                f"'{artifact}': output '{name}' is not finite for a test input",
                hint="check the model in float32, or set providers = ['cpu']",
            )
