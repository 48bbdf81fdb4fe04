"""What the owner may say about models and the listeners: the tables `[models]`, `[http]` and `[grpc]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from millhand.validation import StrictTable


def _number_or_auto(least: int) -> BeforeValidator:
    def check(value: object) -> object:
        if value == "auto" or (type(value) is int and value >= least):
            return value
        raise ValueError(f"give a whole number from {least} on, or 'auto'")

    return BeforeValidator(check)


class ModelSettings(StrictTable):
    paths: tuple[Path, ...] = ()
    """Folders of your own models (each holds `<model>/model.toml`); they win over shipped ones of the same name."""
    load: tuple[str, ...] = ()
    """Models to serve by name, `*` for all. Empty: those that assets use, and all in `paths`."""
    pin: tuple[str, ...] = ()
    """Models to serve that never make room for others, beside those that assets use."""
    memory_bytes_cap: int = Field(default=0, ge=0)
    """Memory that all models on the CPU may take together; 0 sets no limit. An accelerator's comes from the profile.
    A load that needs room unloads the models that were asked least recently."""
    require_proof: bool = False
    """Refuse a version whose artifact has no proof.json that matches it and that a trusted key has signed."""
    trusted_keys: tuple[Path, ...] = ()
    """Public keys (PEM) whose signatures count beside this node's own: the plant's, so that a spare node takes proved
    artifacts over."""
    use_built: bool | tuple[str, ...] = True
    """Serve what was made of a model and chosen in place of its own artifact: of every model, of none, or of those in a
    list."""
    rebuild_stale: bool = True
    """Make a candidate anew, in the background, where it is tied to a library, driver or GPU that this node no longer
    has."""
    built_dir: Path | None = None
    """Where candidates lie that were made of models; none takes `built` in [node] data_dir."""
    deadline_ms: float = Field(default=2000, gt=0)
    """A request that names no deadline gets this one."""
    queue: int = Field(default=256, ge=1)
    """Requests that may wait for one model in its worker; more are refused as overload."""
    threads: Annotated[int | Literal["auto"], _number_or_auto(0)] = 0
    """Threads of one inference on the CPU; `auto` measures at each load how many pay, 0 takes the profile's."""
    cpus: tuple[int, ...] = ()
    """CPU numbers that workers are pinned to; empty takes the profile's, or none."""
    runners: int = Field(default=0, ge=0, le=24)
    """Batches that a worker may run at once, where its backend allows several of one model; 0 takes the profile's."""
    interpreter: Path | None = None
    """Python that runs workers; none takes the profile's, or the daemon's own."""
    load_timeout_s: float = Field(default=60, gt=0)
    """A load with its warm-up that takes longer fails."""
    heartbeat_ms: float = Field(default=2000, gt=0)
    """How often a worker is asked whether it lives."""
    hang_ms: float = Field(default=10_000, gt=0)
    """A worker whose answer or whose single inference takes longer is killed and started again."""
    restart_delay_ms: float = Field(default=100, gt=0)
    """Pause before the first restart; doubled at each further one up to `restart_delay_cap_ms`."""
    restart_delay_cap_ms: float = Field(default=10_000, gt=0)
    deaths_cap: int = Field(default=5, ge=1)
    """So many worker deaths within `deaths_period_s` while one version runs, and the version before it comes back."""
    deaths_period_s: float = Field(default=60, gt=0)
    ring_slots: int = Field(default=16, ge=1, le=1024)
    """Requests in flight whose tensors travel in shared memory, for each connection; more travel in the socket."""
    ring_slot_bytes: int = Field(default=1 << 20, ge=4096, le=1 << 30)
    """Largest request that travels in shared memory. Memory is taken only when a slot is used."""


class HttpSettings(StrictTable):
    enabled: bool = True
    """Serve the Open Inference Protocol and /metrics."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback until you say otherwise."""
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free port (`millhand` shows it)."""
    processes: int = Field(default=0, ge=0, le=64)
    """Processes that accept on the port; 0 takes one for every two CPUs, 1 to 4."""
    body_bytes_cap: int = Field(default=64 << 20, ge=1024)
    """A larger request body is refused with 413."""
    connections_cap: int = Field(default=512, ge=1)
    """Connections that one process serves at once; more are answered 503."""
    keep_alive_s: float = Field(default=30, gt=0)
    """An idle connection is closed after so long."""
    request_timeout_s: float = Field(default=10, gt=0)
    """A request whose head or body takes longer to come, or whose answer is not read for so long, ends with its
    connection."""
    busy_poll_us: int = Field(default=1000, ge=0, le=100_000)
    """While one request is alone under way and its client sends one after the other, wait for an answer awake, at most
    so long: less latency for more CPU time. 0 always sleeps, which saves power."""
    admin_token_file: Path | None = None
    """A file with the token that lets a client list, load and unload models ('Authorization: Bearer <token>').
    None: nobody may."""
    access_log: bool = False
    """Write a line to the log for each request: method, path, status, bytes, time, trace id."""
    access_log_per_minute: int = Field(default=600, ge=1)
    """At most so many of these lines a minute from each process; the rest is counted and said once."""


class TracingSettings(StrictTable):
    enabled: bool = False
    """Send a trace of requests to an OpenTelemetry collector; needs the extra `otel`."""
    endpoint: str = "http://127.0.0.1:4318/v1/traces"
    """Where the collector takes OTLP over HTTP: the whole URL, which mostly ends in `/v1/traces`."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests without a `traceparent` header that are traced; with one, its sampled flag decides."""
    service_name: str = Field(default="millhand", min_length=1)
    """The traces' `service.name`."""

    @field_validator("endpoint")
    @classmethod
    def _whole_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s/]+/\S*", value):
            raise ValueError("give the whole URL, with its path, such as http://127.0.0.1:4318/v1/traces")
        return value


class GrpcSettings(StrictTable):
    enabled: bool = False
    """Serve Triton's inference service over gRPC; costs a process of about 40 MB."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback until you say otherwise."""
    port: int = Field(default=8001, ge=0, le=65535)
    """0 takes a free port (`millhand` shows it)."""
    processes: int = Field(default=0, ge=0, le=64)
    """Processes that accept on the port; 0 takes one for every two CPUs, 1 to 4."""
    message_bytes_cap: int = Field(default=64 << 20, ge=1024, le=1 << 30)
    """A larger message, compressed or not, is refused with RESOURCE_EXHAUSTED."""
    connections_cap: int = Field(default=512, ge=1)
    """Connections of one process; more are closed."""
    streams_cap: int = Field(default=256, ge=1, le=65_535)
    """Calls of one connection at once; clients hold more back."""
    keepalive_s: float = Field(default=60, ge=1)
    """A connection that is silent for so long is asked (PING), and closed if it does not answer within 20 s."""
    busy_poll_us: int = Field(default=1000, ge=0, le=100_000)
    """While one request is alone under way and its client sends one after the other, wait for an answer awake, at most
    so long: less latency for more CPU time. 0 always sleeps, which saves power."""
    admin_token_file: Path | None = None
    """A file with the token that lets a client list, load and unload models. None: nobody may."""
    access_log: bool = False
    """Write a line to the log for each call: method, model, code, bytes, time, trace id."""
    access_log_per_minute: int = Field(default=600, ge=1)
    """At most so many of these lines a minute from each process; the rest is counted and said once."""


class WorkerDefaults(StrictTable):
    """What the profile says about workers; the owner's `[models]` wins."""

    profile: str = ""
    """The profile's name; filled in, like `accelerator`."""
    accelerator: str = "cpu"
    """`cpu`, or the UUID of the GPU or MIG slice."""
    interpreter: Path | None = None
    threads: Annotated[int | Literal["auto"], _number_or_auto(1)] = "auto"
    """Threads of one inference on the CPU; `auto` measures at each load how many pay."""
    cpus: tuple[int, ...] = ()
    runners: int = Field(default=0, ge=0, le=24)
    """Batches that a worker may run at once; 0: on the CPU one for each CPU, at most 4, on an accelerator one."""
    max_batch: int = Field(default=0, ge=0)
    """Upper bound for every model's `max_batch`; 0 sets none."""
    max_delay_us: int = Field(default=0, ge=0, le=1_000_000)
    """How long a request may wait for others to share an inference with, where model.toml does not say."""
    memory_bytes_cap: int = Field(default=0, ge=0)
    """Memory of the accelerator that models may take together; 0 sets no limit. For the CPU the owner says it."""
