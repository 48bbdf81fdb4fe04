"""The gRPC front: Triton's `inference.GRPCInferenceService` and `grpc.health.v1.Health`, run as a process of its own.

hpack.py, connection.py and stream.py carry bytes, server.py and rpc.py make calls of them, requests.py makes tensors of
messages, service.py and repository.py answer. Why not grpcio: docs/decisions/0009-an-own-grpc-server.md.
"""
