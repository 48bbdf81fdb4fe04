"""Message classes, made from the compiled descriptor `inference.binpb`; why: docs/decisions/0005.

Their types are in wire.pyi. After a change of a .proto run, with grpcio-tools installed, in this folder:

    python -m grpc_tools.protoc -I . --descriptor_set_out=inference.binpb inference.proto status.proto
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_set = descriptor_pb2.FileDescriptorSet.FromString((files(__package__) / "inference.binpb").read_bytes())
_pool = descriptor_pool.DescriptorPool()
for _file in _set.file:
    _pool.Add(_file)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(name))


ServerLiveResponse = _message("inference.ServerLiveResponse")
ServerReadyResponse = _message("inference.ServerReadyResponse")
ServerMetadataResponse = _message("inference.ServerMetadataResponse")
ModelRequest = _message("inference.ModelRequest")
ModelReadyResponse = _message("inference.ModelReadyResponse")
ModelMetadataResponse = _message("inference.ModelMetadataResponse")
InferParameter = _message("inference.InferParameter")
InferTensorContents = _message("inference.InferTensorContents")
ModelInferRequest = _message("inference.ModelInferRequest")
ModelInferResponse = _message("inference.ModelInferResponse")
ModelStreamInferResponse = _message("inference.ModelStreamInferResponse")
ModelConfigResponse = _message("inference.ModelConfigResponse")
ModelStatistics = _message("inference.ModelStatistics")
ModelStatisticsResponse = _message("inference.ModelStatisticsResponse")
RepositoryIndexRequest = _message("inference.RepositoryIndexRequest")
RepositoryIndexResponse = _message("inference.RepositoryIndexResponse")
RepositoryModelRequest = _message("inference.RepositoryModelRequest")
Status = _message("millhand.Status")
ErrorInfo = _message("millhand.ErrorInfo")
HealthCheckRequest = _message("millhand.HealthCheckRequest")
HealthCheckResponse = _message("millhand.HealthCheckResponse")

DATA_TYPE = {
    value.name.removeprefix("TYPE_"): value.number for value in _pool.FindEnumTypeByName("inference.DataType").values
}
"""Datatype of the protocol -> number in a model's configuration; BYTES are called STRING there."""
