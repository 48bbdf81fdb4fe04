"""What the gateway counts, beside the requests that every front counts; docs/metrics.md lists it.

Where vLLM measures the same, the page of vLLM's names has its name (and its unit, and its label `model_name`).
Source of the names: vLLM's page "Production Metrics", https://docs.vllm.ai/en/stable/usage/metrics/.
"""

from __future__ import annotations

from millhand.metrics import Counter, Gauge, Histogram
from millhand.serving.front_metrics import FRONT

_MODEL = ("model_name",)
_TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_FIRST_BOUNDS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE_BOUNDS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

RUNNING = Gauge(
    FRONT,
    "millhand_language_requests_running",
    "Requests that a language server answers now.",
    _MODEL,
    vllm="vllm:num_requests_running",
)
WAITING = Gauge(
    FRONT,
    "millhand_language_requests_waiting",
    "Requests that wait in the gateway's queue.",
    _MODEL,
    vllm="vllm:num_requests_waiting",
)
PROMPT_TOKENS = Counter(
    FRONT,
    "millhand_language_prompt_tokens_total",
    "Tokens read, as the server says.",
    _MODEL,
    vllm="vllm:prompt_tokens_total",
)
GENERATION_TOKENS = Counter(
    FRONT,
    "millhand_language_generation_tokens_total",
    "Tokens written, as the server says.",
    _MODEL,
    vllm="vllm:generation_tokens_total",
)
SUCCESS = Counter(
    FRONT,
    "millhand_language_request_success_total",
    "Answers that came to their end, by what ended them.",
    ("model_name", "finished_reason"),
    vllm="vllm:request_success_total",
)
FIRST_TOKEN_SECONDS = Histogram(
    FRONT,
    "millhand_language_time_to_first_token_seconds",
    "From a request's head to the first piece of its streamed answer.",
    _MODEL,
    bounds=_FIRST_BOUNDS_S,
    vllm="vllm:time_to_first_token_seconds",
)
TOKEN_SECONDS = Histogram(
    FRONT,
    "millhand_language_inter_token_latency_seconds",
    "Time between two pieces of a streamed answer, as the client sees it.",
    _MODEL,
    bounds=_TOKEN_BOUNDS_S,
    vllm="vllm:inter_token_latency_seconds",
)
WHOLE_SECONDS = Histogram(
    FRONT,
    "millhand_language_request_latency_seconds",
    "From a request's head to the end of its answer.",
    _MODEL,
    bounds=_WHOLE_BOUNDS_S,
    vllm="vllm:e2e_request_latency_seconds",
)
QUEUE_SECONDS = Histogram(
    FRONT,
    "millhand_language_request_queue_seconds",
    "Time that a request waited in the gateway's queue.",
    _MODEL,
    bounds=_FIRST_BOUNDS_S,
    vllm="vllm:request_queue_time_seconds",
)
ENDINGS = Counter(
    FRONT,
    "millhand_gateway_failures_total",
    "Requests that did not get their whole answer, by code: client_left, refusals, limits, failures of the server.",
    ("model_name", "code"),
)
GUARD_DECISIONS = Counter(
    FRONT,
    "millhand_guard_decisions_total",
    "Decisions of guards, by rule: pass, change or refuse.",
    ("guard", "rule", "action", "stage"),
)
GUARDED = Counter(
    FRONT,
    "millhand_guard_requests_total",
    "Requests that guards looked at, by outcome: passed or refused.",
    ("model_name", "outcome"),
)
