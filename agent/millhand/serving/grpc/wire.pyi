from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import Message

_Item = TypeVar("_Item")

class _Repeated(Generic[_Item]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Item]: ...
    def __getitem__(self, index: int) -> _Item: ...
    def add(self, **fields: object) -> _Item: ...
    def append(self, item: _Item) -> None: ...
    def extend(self, items: Sequence[_Item]) -> None: ...

class InferParameter(Message):
    bool_param: bool
    int64_param: int
    string_param: str
    double_param: float
    uint64_param: int

class _Parameters(Mapping[str, InferParameter]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, key: str) -> InferParameter: ...

class ServerLiveResponse(Message):
    def __init__(self, *, live: bool) -> None: ...

class ServerReadyResponse(Message):
    def __init__(self, *, ready: bool) -> None: ...

class ServerMetadataResponse(Message):
    def __init__(self, *, name: str, version: str, extensions: Sequence[str]) -> None: ...

class ModelRequest(Message):
    name: str
    version: str

class ModelReadyResponse(Message):
    def __init__(self, *, ready: bool) -> None: ...

class ModelMetadataResponse(Message):
    class TensorMetadata(Message): ...

    inputs: _Repeated[TensorMetadata]
    outputs: _Repeated[TensorMetadata]
    def __init__(self, *, name: str, versions: Sequence[str], platform: str) -> None: ...

class InferTensorContents(Message):
    bool_contents: _Repeated[bool]
    int_contents: _Repeated[int]
    int64_contents: _Repeated[int]
    uint_contents: _Repeated[int]
    uint64_contents: _Repeated[int]
    fp32_contents: _Repeated[float]
    fp64_contents: _Repeated[float]
    bytes_contents: _Repeated[bytes]

class ModelInferRequest(Message):
    class InferInputTensor(Message):
        name: str
        datatype: str
        shape: _Repeated[int]
        parameters: _Parameters
        contents: InferTensorContents

    class InferRequestedOutputTensor(Message):
        name: str
        parameters: _Parameters

    model_name: str
    model_version: str
    id: str
    parameters: _Parameters
    inputs: _Repeated[InferInputTensor]
    outputs: _Repeated[InferRequestedOutputTensor]
    raw_input_contents: _Repeated[bytes]

class ModelInferResponse(Message):
    class InferOutputTensor(Message): ...

    id: str
    parameters: _Parameters
    outputs: _Repeated[InferOutputTensor]
    raw_output_contents: _Repeated[bytes]
    def __init__(self, *, model_name: str, model_version: str, id: str) -> None: ...

class ModelStreamInferResponse(Message):
    infer_response: ModelInferResponse
    def __init__(self, *, error_message: str = ..., infer_response: ModelInferResponse = ...) -> None: ...

class ModelConfigResponse(Message):
    class _Config(Message):
        class _Tensor(Message): ...

        class _Batching(Message):
            max_queue_delay_microseconds: int

        name: str
        platform: str
        backend: str
        max_batch_size: int
        input: _Repeated[_Tensor]
        output: _Repeated[_Tensor]
        dynamic_batching: _Batching

    config: _Config

class _Duration(Message):
    count: int
    ns: int

class ModelStatistics(Message):
    class _Request(Message):
        success: _Duration
        fail: _Duration
        queue: _Duration
        compute_infer: _Duration

    class _Batch(Message):
        compute_infer: _Duration

    inference_stats: _Request
    batch_stats: _Repeated[_Batch]

class ModelStatisticsResponse(Message):
    model_stats: _Repeated[ModelStatistics]

class RepositoryIndexRequest(Message):
    repository_name: str
    ready: bool

class RepositoryIndexResponse(Message):
    class ModelIndex(Message): ...

    models: _Repeated[ModelIndex]

class ModelRepositoryParameter(Message):
    bool_param: bool
    int64_param: int
    string_param: str
    bytes_param: bytes

class RepositoryModelRequest(Message):
    repository_name: str
    model_name: str
    parameters: Mapping[str, ModelRepositoryParameter]

class _Details:
    def add(self, *, type_url: str, value: bytes) -> None: ...

class Status(Message):
    code: int
    message: str
    details: _Details
    def __init__(self, *, code: int, message: str) -> None: ...

class ErrorInfo(Message):
    reason: str
    domain: str
    metadata: Mapping[str, str]
    def __init__(self, *, reason: str, domain: str, metadata: Mapping[str, str]) -> None: ...

class HealthCheckRequest(Message):
    service: str

class HealthCheckResponse(Message):
    def __init__(self, *, status: int) -> None: ...

DATA_TYPE: dict[str, int]
