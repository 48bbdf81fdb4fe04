"""The HTTP front: HTTP/1.1 on asyncio, the Open Inference Protocol v2 and /metrics on top of it.

`connection` speaks HTTP, `messages` holds what it passes on, `endpoints` answers, `infer` is the endpoint that must be
fast, `openapi` describes them, `server` accepts. Why an own protocol class and no framework: docs/performance.md.
"""
