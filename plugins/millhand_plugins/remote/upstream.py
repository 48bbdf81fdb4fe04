"""One upstream: its connections, its circuit breaker, and what it said of itself."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from numpy.typing import NDArray

from millhand.errors import InputError, ModelError
from millhand.serving.tensors import DATATYPE_OF, DATATYPES, Specs, Tensors
from millhand_plugins.remote.breaker import CLOSED, OPEN, Breaker, BreakerRules
from millhand_plugins.remote.channel import Channel, Reply, UpstreamError, UpstreamLate
from millhand_plugins.remote.codec import Expected, WrongAnswer, answer_bytes_cap, decode_answer, encode_request
from millhand_plugins.remote.options import Policy, UpstreamFile, read_token

log = logging.getLogger("millhand.remote")

METADATA_BYTES_CAP = 1 << 20
BLAMES_REQUEST = frozenset({400, 413, 422})
"""Answers that speak of this request's values or size. Every other refusal would meet any request."""
HINTS = {
    401: "does it know our token? see token_file",
    403: "may our token use this model?",
    404: "does the model stand there, loaded, under this name and version?",
    429: "it is overloaded; the request may be sent again",
    503: "it is overloaded, or the model is not ready there",
}


class LeftAlone(UpstreamError):
    """The upstream was not asked: its circuit is open."""


class UpstreamMismatch(UpstreamError):
    """The upstream's model takes or gives something else than model.toml declares."""


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _Metadata(msgspec.Struct):
    name: str
    inputs: list[_Tensor] | None = None
    outputs: list[_Tensor] | None = None


class _Server(msgspec.Struct):
    extensions: list[str] | None = None


class _Fault(msgspec.Struct):
    error: str = ""


class Upstream:
    """Asks one URL for one model. Thread-safe."""

    def __init__(self, url: str, file: UpstreamFile, folder: Path, policy: Policy) -> None:
        """Connects to nothing yet. Raises ModelError where `ca_file` cannot be used."""
        self.url = url
        self.on_change: Callable[[str], None] = lambda state: None
        """Called with the circuit's new state, `open` or `closed`."""
        self.breaker = Breaker(
            BreakerRules(
                failures=policy.failures,
                failure_rate=policy.failure_rate,
                window=policy.rate_window,
                retry_ns=int(policy.retry_ms * 1e6),
                retry_cap_ns=int(policy.retry_cap_ms * 1e6),
            )
        )
        ca_file = str(folder / file.ca_file) if file.ca_file else None
        try:
            self._channel = Channel(url, int(policy.connect_timeout_ms * 1e6), ca_file)
        except OSError as error:
            raise ModelError(f"ca_file = '{ca_file}' cannot be used: {error}", hint="give PEM certificates") from error
        self._file, self._folder, self._policy = file, folder, policy
        version = f"/versions/{quote(file.version, safe='')}" if file.version else ""
        self._path = f"/v2/models/{quote(file.model, safe='')}{version}"
        self._numbers, self._session = itertools.count(1), uuid.uuid4().hex[:8]
        self._inputs: Specs = {}
        self._outputs: Specs = {}
        self._known = False
        """Whether it has said what it is since the circuit last opened."""
        self._binary = False
        self._headers: Mapping[str, str] = {}
        self.failure: UpstreamError | None = None
        """The last that opened the circuit, or might have."""

    def declare(self, inputs: Specs, outputs: Specs) -> None:
        """Say what the model must take and give."""
        self._inputs, self._outputs = inputs, outputs

    def describe(self, end_ns: int) -> tuple[Specs, Specs]:
        """Ask for the server's extensions, and return the model's inputs and outputs. Raises UpstreamError."""
        try:
            token = read_token(self._file, self._folder)
        except ModelError as error:
            raise UpstreamError(error.message, hint=error.hint) from error
        self._headers = dict([token]) if token else {}
        server = self._get("/v2", end_ns)
        extensions = self._read(server, _Server).extensions if server.status == 200 else None
        self._binary = "binary_tensor_data" in (extensions or ())
        reply = self._get(self._path, end_ns)
        if reply.status != 200:
            raise self._refusal(reply)
        metadata = self._read(reply, _Metadata)
        if metadata.name != self._file.model:
            raise self._mismatch(f"calls itself model '{metadata.name[:60]}', asked was '{self._file.model}'")
        return _specs(metadata.inputs or []), _specs(metadata.outputs or [])

    def check(self, end_ns: int) -> None:
        """Compare what the upstream says of its model with what was declared. Raises UpstreamError."""
        inputs, outputs = self.describe(end_ns)
        for role, declared, found in (("input", self._inputs, inputs), ("output", self._outputs, outputs)):
            if found:  # a server may say nothing of tensors
                self._compare(role, declared, found)
        self._known = True

    def infer(self, tensors: Tensors, rows: int, end_ns: int) -> dict[str, NDArray[Any]]:
        """Run one batch, until `end_ns` (CLOCK_MONOTONIC).

        Raises InputError where the upstream blames the request, UpstreamError where it is at fault or is left alone.
        """
        ticket = self.breaker.admit()
        if ticket is None:
            raise self._left_alone()
        started_ns, ok = time.monotonic_ns(), None
        try:
            if not self._known:
                self.check(end_ns)
            outputs = self._ask(tensors, rows, end_ns)
            ok = True
            return outputs
        except InputError:
            ok, self._known = True, False  # some servers say 400 where a model has gone: look before the next request
            raise
        except UpstreamError as error:
            waited_ns = time.monotonic_ns() - started_ns
            if error.counted and not (isinstance(error, UpstreamLate) and waited_ns < self._policy.patience_ms * 1e6):
                ok, self.failure = False, error
            raise
        finally:
            self._settle(ticket, ok)

    def give_up(self, error: UpstreamError) -> None:
        """Open the circuit after a failed `check`."""
        self.failure = error
        self.breaker.trip()

    def health(self) -> str:
        """The circuit and the last error, in words."""
        state, retry_s = self.breaker.state, self.breaker.retry_in_ns / 1e9
        when = ""
        if state == OPEN:
            when = f", tried again in {retry_s:.1f} s" if retry_s else ", tried by the next request"
        last = f"; last error: {self.failure.message}" if self.failure else ""
        return f"{self.url}: circuit {state}{when}{last}"

    def close(self) -> None:
        self._channel.close()

    def _settle(self, ticket: int, ok: bool | None) -> None:
        changed = self.breaker.settle(ticket, ok)
        if changed:
            self.on_change(changed)
        if changed == OPEN:
            self._known = False
            retry_s = self.breaker.retry_in_ns / 1e9
            log.warning("upstream '%s' is left alone for %.1f s: %s", self.url, retry_s, self.failure)
        elif changed == CLOSED:
            log.warning("upstream '%s' answers again", self.url)

    def _ask(self, tensors: Tensors, rows: int, end_ns: int) -> dict[str, NDArray[Any]]:
        number = f"{self._session}-{next(self._numbers)}"
        expected = Expected(self._file.model, self._file.version, number, rows, self._outputs)
        left_ns = end_ns - time.monotonic_ns()
        parameters = {"deadline_ms": max(left_ns // 1_000_000, 1), "timeout": max(left_ns // 1_000, 1)}
        fields, body = encode_request(tensors, expected, parameters, self._binary)
        bytes_cap = answer_bytes_cap(self._outputs, rows, self._policy.answer_bytes_cap)
        reply = self._channel.request(
            "POST", f"{self._path}/infer", {**self._headers, **fields}, body, end_ns=end_ns, bytes_cap=bytes_cap
        )
        if reply.status in BLAMES_REQUEST:
            raise InputError(self._said(reply), hint="send what the upstream's model takes")
        if reply.status != 200:
            raise self._refusal(reply)
        try:
            return decode_answer(reply.headers, reply.body, expected)
        except WrongAnswer as error:
            raise UpstreamError(f"upstream '{self.url}' {error}", hint="its answer was not used") from error

    def _get(self, path: str, end_ns: int) -> Reply:
        return self._channel.request("GET", path, self._headers, [], end_ns=end_ns, bytes_cap=METADATA_BYTES_CAP)

    def _read(self, reply: Reply, model: type[Any]) -> Any:
        try:
            return msgspec.json.decode(reply.body, type=model)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(
                f"upstream '{self.url}' gave metadata that is none of the Open Inference Protocol: {error}",
                hint="does an inference server listen there?",
            ) from error

    def _compare(self, role: str, declared: Specs, found: Specs) -> None:
        """A free dimension of the upstream may be fixed by model.toml, not the other way round."""
        for name, (dtype, shape) in declared.items():
            if name not in found:
                raise self._mismatch(f"has no {role} '{name}', its {role}s are {', '.join(found)[:200]}")
            their_dtype, theirs = found[name]
            if their_dtype != dtype:
                their_name = DATATYPE_OF.get(their_dtype, their_dtype)
                raise self._mismatch(f"has {role} '{name}' as {their_name[:20]}, model.toml says {DATATYPE_OF[dtype]}")
            if len(theirs) != len(shape) or any(b not in (-1, a) for a, b in zip(shape, theirs)):  # noqa: B905
                raise self._mismatch(f"has {role} '{name}' in shape {list(theirs[:8])}, model.toml says {list(shape)}")
        extra = [name for name in found if name not in declared]
        if extra and role == "input":
            raise self._mismatch(f"needs input '{extra[0][:60]}', which model.toml does not declare")

    def _mismatch(self, what: str) -> UpstreamMismatch:
        return UpstreamMismatch(f"upstream '{self.url}' {what}", hint="mend model.toml, or the model there")

    def _refusal(self, reply: Reply) -> UpstreamError:
        status = reply.status
        if 300 <= status < 400:
            target = reply.headers.get("location", "nowhere")[:200]
            return UpstreamError(
                f"upstream '{self.url}' redirects ({status}) to '{target}', which is not followed",
                hint="write the final address into `urls`",
            )
        if status == 504:
            return UpstreamLate(self._said(reply), hint="is it overloaded?")
        return UpstreamError(self._said(reply), hint=HINTS.get(status, "see the upstream's log"))

    def _said(self, reply: Reply) -> str:
        try:
            said = msgspec.json.decode(reply.body, type=_Fault).error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            said = ""
        said = "".join(character if character.isprintable() else " " for character in said[:300])
        return f"upstream '{self.url}' answered {reply.status}" + (f": {said}" if said else "")

    def _left_alone(self) -> LeftAlone:
        state, left_s = self.breaker.state, self.breaker.retry_in_ns / 1e9
        when = f"it is tried again in {left_s:.1f} s" if state == OPEN else "one request is trying it now"
        return LeftAlone(
            f"upstream '{self.url}' is left alone (circuit {state}), {when}; last: {self.failure}",
            hint="send the request again later, or declare a fallback",
        )


def _specs(tensors: list[_Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (DATATYPES.get(tensor.datatype, tensor.datatype), tuple(tensor.shape)) for tensor in tensors}
