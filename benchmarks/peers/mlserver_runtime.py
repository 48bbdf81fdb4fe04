"""MLServer's custom runtime around ONNX Runtime (its own package for ONNX is not published)."""

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class OnnxRuntime(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tensor = payload.inputs[0]
        x = np.array(tensor.data.root, dtype=np.float32).reshape(tensor.shape)
        (y,) = self._session.run(None, {"input": x})
        output = ResponseOutput(name="logits", datatype="FP32", shape=list(y.shape), data=y.ravel().tolist())
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])
