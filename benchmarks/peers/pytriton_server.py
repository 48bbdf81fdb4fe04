"""PyTriton: Triton with its Python backend around ONNX Runtime, its dynamic batcher on.

Run in a venv of its own: `python pytriton_server.py MODEL HTTP_PORT GRPC_PORT`.
"""

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main() -> None:
    path, http_port, grpc_port = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @batch
    def infer(input: np.ndarray) -> dict[str, np.ndarray]:
        (y,) = session.run(None, {"input": input})
        return {"logits": y}

    config = TritonConfig(http_port=int(http_port), grpc_port=int(grpc_port), allow_metrics=False, log_verbose=0)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="cnn",
            infer_func=infer,
            inputs=[Tensor(name="input", dtype=np.float32, shape=tuple(session.get_inputs()[0].shape[1:]))],
            outputs=[Tensor(name="logits", dtype=np.float32, shape=tuple(session.get_outputs()[0].shape[1:]))],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main()
