"""An answered HTTP request as traces and the access log take it."""

from __future__ import annotations

import time

from millhand.serving.http.messages import Request, Response
from millhand.serving.observation import Observation
from millhand.serving.tracing import RequestTrace


def observe(observation: Observation, request: Request, response: Response) -> None:
    """Hand a request over after its answer was written."""
    head, end_ns = request.head, time.time_ns()
    unix_ns = end_ns - time.monotonic_ns()  # Unix time where CLOCK_MONOTONIC is 0
    inference = response.inference
    trace = RequestTrace(
        method=head.method,
        path=head.raw_path.decode("latin-1"),
        route="" if request.route == "other" else request.route,
        status=response.status,
        start_ns=request.started_ns + unix_ns,
        end_ns=end_ns,
        traceparent=head.headers.get(b"traceparent", b"").decode("latin-1"),
        model=inference.model if inference else "",
        version=str(inference.version) if inference else "",
        infer_ns=inference.sent_ns + unix_ns if inference else 0,
        queue_ns=inference.queue_ns if inference else 0,
        compute_ns=inference.compute_ns if inference else 0,
    )
    observation.answered(trace, len(response.body))
