"""The Sparkplug payload's message class, made from the compiled descriptor `sparkplug.binpb`.

Generated Python code binds to one major version of protobuf's runtime and warns on the next; a descriptor does not, so
that this package can live beside others. Its types are in wire.pyi. After a change of sparkplug.proto run, with
grpcio-tools installed, in this folder:

    python -m grpc_tools.protoc -I . --descriptor_set_out=sparkplug.binpb sparkplug.proto
"""

from __future__ import annotations

from importlib.resources import files

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_set = descriptor_pb2.FileDescriptorSet.FromString((files(__package__) / "sparkplug.binpb").read_bytes())
_pool = descriptor_pool.DescriptorPool()
for _file in _set.file:
    _pool.Add(_file)

Payload = message_factory.GetMessageClass(_pool.FindMessageTypeByName("org.eclipse.tahu.protobuf.Payload"))
