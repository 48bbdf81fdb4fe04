"""The backend and its session. Imported in workers: Python 3.10 and the standard library."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from millhand.errors import DeadlineError, InputError, MillhandError, ModelError, WorkerError
from millhand.hookspecs import Health
from millhand.serving.tensors import Specs, Tensors, check_inputs
from millhand_plugins.remote.breaker import CLOSED, OPEN
from millhand_plugins.remote.channel import UpstreamError
from millhand_plugins.remote.local import LocalModel
from millhand_plugins.remote.options import Policy, UpstreamFile, check_hosts, read_policy, read_upstream_file
from millhand_plugins.remote.upstream import LeftAlone, Upstream, UpstreamMismatch

NO_LIMIT = 1 << 31
COUNTS = ("upstream", "local", "unanswered", "upstream_failures", "circuit_open", "circuit_closed")
"""Batches by who answered them; calls of upstreams that failed; how often a circuit opened and closed."""


class RemoteBackend:
    """`Backend` and `DeclaredBackend` for the TOML file that says where an upstream is."""

    name = "remote"
    suffixes: tuple[str, ...] = (".toml",)

    def __init__(self, hosts: tuple[str, ...]) -> None:
        """`hosts`: where the owner lets tensors go."""
        self._hosts = hosts

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> RemoteSession:
        """As `load_declared`, with inputs and outputs as the first upstream that answers has them: one must."""
        file, policy = self._read(artifact, options)
        upstreams = _upstreams(file, artifact, policy)
        failures = []
        try:
            for upstream in upstreams:
                try:
                    inputs, outputs = upstream.describe(_in_ms(policy.timeout_ms))
                except UpstreamError as error:
                    failures.append(error.message)
                    continue
                if not inputs or not outputs:
                    failures.append(f"upstream '{upstream.url}' does not say what its model takes and gives")
                    continue
                return self.load_declared(artifact, accelerator, options, inputs, outputs)
        finally:
            _close(upstreams)
        raise ModelError("; ".join(failures), hint="start an upstream, or load the model by its model.toml")

    def load_declared(
        self, artifact: Path, accelerator: str, options: Mapping[str, Any], inputs: Specs, outputs: Specs
    ) -> RemoteSession:
        """Read the file, ask the upstreams what they are, and load the fallback. Where nothing is declared, as `load`.

        An upstream that cannot be asked is left alone until its circuit's next try. Raises ModelError naming file and
        key, or the URL whose model is another; PluginError for a fallback's backend that is not there.
        """
        if not inputs and not outputs:
            return self.load(artifact, accelerator, options)
        file, policy = self._read(artifact, options)
        local = None
        if file.fallback is not None:
            threads = int(options.get("threads") or 1)
            local = LocalModel(file.fallback, artifact.parent, accelerator, threads, (inputs, outputs))
        upstreams = _upstreams(file, artifact, policy)
        try:
            _check(upstreams, inputs, outputs, policy)
            if local is not None and not policy.fallback_lazy:
                local.load()
        except BaseException:
            _close(upstreams)
            raise
        return RemoteSession(file.model, upstreams, local, policy, inputs, outputs)

    def _read(self, artifact: Path, options: Mapping[str, Any]) -> tuple[UpstreamFile, Policy]:
        if tuple(options.get("hosts", self._hosts)) != self._hosts:
            raise ModelError(
                "model.toml sets 'hosts' under [options]", hint="only the owner may: set it in [plugins.remote]"
            )
        file = read_upstream_file(artifact)
        check_hosts(file.urls, self._hosts)
        return file, read_policy(options)


class RemoteSession:
    """`Session`, `DeadlineSession`, `CountingSession` and `DependentSession`: upstreams in order of preference, and a
    fallback."""

    concurrent = True
    """Several batches may run at once, each in a thread of its own."""

    def __init__(
        self,
        name: str,
        upstreams: list[Upstream],
        local: LocalModel | None,
        policy: Policy,
        inputs: Specs,
        outputs: Specs,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.counts = dict.fromkeys(COUNTS, 0)
        self._name, self._upstreams, self._local = name, upstreams, local
        self._timeout_ns = int(policy.timeout_ms * 1e6)
        self._reserve_ns = policy.fallback_reserve_ms * 1e6
        self._lock = threading.Lock()
        for upstream in upstreams:
            self.counts["circuit_open"] += int(upstream.breaker.state == OPEN)
            upstream.on_change = lambda state: self._count(f"circuit_{state}")

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """`run_until` without a deadline; each upstream still has no longer than `timeout_ms`."""
        return self.run_until(inputs, 0)

    def run_until(self, inputs: Tensors, deadline_ns: int) -> dict[str, NDArray[Any]]:
        """Answer one batch from the first upstream that does, else from the fallback.

        Raises InputError where the request is at fault, DeadlineError, or WorkerError that says what each upstream did.
        """
        rows = check_inputs(self._name, self.inputs, inputs, NO_LIMIT)
        failures: list[MillhandError] = []
        end_ns = self._upstreams_end_ns(deadline_ns)
        for position, upstream in enumerate(self._upstreams):
            try:
                outputs = upstream.infer(inputs, rows, self._share_end_ns(position, end_ns))
            except UpstreamError as error:
                failures.append(error)
                if not isinstance(error, LeftAlone):
                    self._count("upstream_failures")
            else:
                self._count("upstream")
                return outputs
        return self._without_upstream(inputs, deadline_ns, failures)

    def health(self) -> Health:
        """Each upstream's circuit and last error, the fallback, and who has answered."""
        counts, local = self.counts, self._local
        by = {"upstreams": counts["upstream"], "the fallback": counts["local"], "none": counts["unanswered"]}
        facts = [
            *(("upstream", upstream.health()) for upstream in self._upstreams),
            ("fallback", "none" if local is None else local.name),
            ("batches", ", ".join(f"{count} answered by {who}" for who, count in by.items())),
        ]
        failures = [upstream.failure for upstream in self._upstreams if upstream.breaker.state != CLOSED]
        if local is not None or len(failures) < len(self._upstreams):
            return Health(facts)
        known = [failure for failure in failures if failure is not None]
        text = "; ".join(failure.message for failure in known)
        return Health(facts, f"{text}, and there is no fallback", known[0].hint if known else "")

    def close(self) -> None:
        _close(self._upstreams)
        if self._local is not None:
            self._local.close()

    def _without_upstream(
        self, inputs: Tensors, deadline_ns: int, failures: list[MillhandError]
    ) -> dict[str, NDArray[Any]]:
        if self._local is not None:
            try:
                outputs = self._local.run(inputs, deadline_ns)
            except InputError:
                raise
            except MillhandError as error:
                failures.append(error)
            else:
                self._count("local")
                return outputs
        self._count("unanswered")
        text = "; ".join(failure.message for failure in failures)
        if deadline_ns and time.monotonic_ns() >= deadline_ns:
            raise DeadlineError(f"the deadline passed: {text}", hint="give it more time, or declare a fallback")
        raise WorkerError(text, hint=failures[0].hint)

    def _upstreams_end_ns(self, deadline_ns: int) -> int | None:
        """When the fallback must begin, or the deadline where there is none; None without a deadline."""
        if not deadline_ns or self._local is None:
            return deadline_ns or None
        left_ns = deadline_ns - time.monotonic_ns()
        reserve_ns = min(max(self._reserve_ns, 2 * self._local.slowest_ns), left_ns / 2)
        return deadline_ns - int(reserve_ns)

    def _share_end_ns(self, position: int, end_ns: int | None) -> int:
        """An equal share of the time for each upstream that may still be asked, `timeout_ms` at most."""
        now_ns = time.monotonic_ns()
        if end_ns is None:
            return now_ns + self._timeout_ns
        ready = sum(upstream.breaker.passable for upstream in self._upstreams[position:])
        return now_ns + min(self._timeout_ns, (end_ns - now_ns) // max(ready, 1))

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def _upstreams(file: UpstreamFile, artifact: Path, policy: Policy) -> list[Upstream]:
    return [Upstream(url, file, artifact.parent, policy) for url in file.urls]


def _check(upstreams: list[Upstream], inputs: Specs, outputs: Specs, policy: Policy) -> None:
    failures = []
    for upstream in upstreams:
        upstream.declare(inputs, outputs)
        try:
            upstream.check(_in_ms(policy.timeout_ms))
        except UpstreamMismatch as error:
            raise ModelError(error.message, hint=error.hint) from error
        except UpstreamError as error:
            upstream.give_up(error)
            failures.append(error.message)
    if policy.require_upstream and len(failures) == len(upstreams):
        raise ModelError("; ".join(failures), hint="start an upstream, or set require_upstream = false")


def _in_ms(milliseconds: float) -> int:
    return time.monotonic_ns() + int(milliseconds * 1e6)


def _close(upstreams: list[Upstream]) -> None:
    for upstream in upstreams:
        upstream.close()
