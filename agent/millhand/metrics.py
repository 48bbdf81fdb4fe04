"""What a node measures of itself, in Prometheus' text format; docs/metrics.md lists every family.

A family is made once: at the foot of this module where it is set as things happen, in millhand.node_metrics and
millhand.serving.worker_metrics where it is taken from what the parts count, in millhand.serving.front_metrics where a
front process counts. Names carry units; the prefix is `millhand_`, except where a name that dashboards already know
means the same (Triton's `nv_*`). Why not prometheus_client: docs/decisions/0004-own-metrics-writer.md; why there are
two pages: docs/decisions/0007-two-pages-of-metrics.md.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


TRITON = "triton"
"""The page whose names and types are Triton's own, whether Prometheus' linter likes them or not."""
VLLM = "vllm"
"""The page where what vLLM measures too has vLLM's names, whose colon the linter refuses."""
PAGES = ("", TRITON, VLLM)


class Family:
    """One metric family; `labels` are the names of its labels, in order."""

    kind = "untyped"

    def __init__(
        self,
        registry: Registry,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        plain_kind: str | None = None,
        vllm: str = "",
    ) -> None:
        """`plain_kind`: the type that the plain page gives a name whose own type breaks Prometheus' rules for names;
        empty where no type mends it, and the plain page leaves the family out. `vllm`: the name on vLLM's page.
        """
        self.name = name
        self.text = text
        self.labels = tuple(labels)
        self.plain_kind = self.kind if plain_kind is None else plain_kind
        self.vllm = vllm
        self._values: dict[tuple[str, ...], Any] = {}
        registry.add(self)

    def clear(self) -> None:
        """Forget every series; for families that are set anew as a whole."""
        self._values.clear()

    def name_on(self, page: str) -> str:
        """The family's name on a page."""
        return self.vllm or self.name if page == VLLM else self.name

    def samples(self, page: str = "") -> Iterable[str]:
        """The sample lines."""
        name = self.name_on(page)
        for key, value in sorted(self._values.items()):
            yield f"{name}{_labels(self.labels, key)} {number(value)}"

    def snapshot(self) -> dict[str, Any]:
        """The family with its values as plain data, for `Registry.merge` in another process."""
        return {
            "name": self.name,
            "kind": self.kind,
            "text": self.text,
            "labels": self.labels,
            "vllm": self.vllm,
            "values": [[key, value] for key, value in self._values.items()],
        }

    def merge(self, key: tuple[str, ...], value: Any) -> None:
        """Add another registry's value of the series `key`."""
        self._values[key] = self._values.get(key, 0) + value

    def _key(self, labels: Mapping[str, Any]) -> tuple[str, ...]:
        if set(labels) != set(self.labels):
            raise ValueError(f"metric {self.name} has labels {self.labels}, not {tuple(labels)}")
        return tuple(str(labels[name]) for name in self.labels)


class Gauge(Family):
    """A value that goes up and down."""

    kind = "gauge"

    def set(self, value: float, **labels: Any) -> None:
        self._values[self._key(labels)] = value


class Counter(Family):
    """A value that only grows, until its process ends."""

    kind = "counter"

    def inc(self, amount: float = 1, **labels: Any) -> None:
        self.merge(self._key(labels), amount)

    def set_total(self, total: float, **labels: Any) -> None:
        """Take over a total that another process or table counts."""
        self._values[self._key(labels)] = total


class Histogram(Family):
    """Counts of observations up to each bound, their sum and their number."""

    kind = "histogram"

    def __init__(
        self,
        registry: Registry,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float],
        vllm: str = "",
    ) -> None:
        super().__init__(registry, name, text, labels, vllm=vllm)
        self.bounds = tuple(bounds)

    def observe(self, value: float, count: int = 1, **labels: Any) -> None:
        """Count `count` observations of `value`."""
        self.observe_in(self._key(labels), value, count)

    def observe_in(self, key: tuple[str, ...], value: float, count: int = 1) -> None:
        """The same for a caller that keeps the values of the labels, in order: the quick way."""
        series = self._series(key)
        series[bisect.bisect_left(self.bounds, value)] += count
        series[-1] += value * count

    def add_counts(self, counts: Sequence[int], total: float, **labels: Any) -> None:
        """Add what another process observed: a count for each bound and one above them all, and the sum."""
        self.merge(self._key(labels), [*counts, total])

    def merge(self, key: tuple[str, ...], value: Sequence[float]) -> None:
        series = self._series(key)
        for place, part in enumerate(value):
            series[place] += part

    def samples(self, page: str = "") -> Iterable[str]:
        name = self.name_on(page)
        for key, (*counts, total) in sorted(self._values.items()):
            below = 0
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                below += count
                yield f"{name}_bucket{_labels((*self.labels, 'le'), (*key, number(bound)))} {below}"
            yield f"{name}_sum{_labels(self.labels, key)} {number(total)}"
            yield f"{name}_count{_labels(self.labels, key)} {below}"

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "bounds": self.bounds}

    def _series(self, key: tuple[str, ...]) -> list[float]:
        """Counts for each bound and one above them all, then the sum of the values."""
        series: list[float] = self._values.setdefault(key, [0] * (len(self.bounds) + 2))
        return series


KINDS: dict[str, Callable[..., Family]] = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}


class Registry:
    """A process's families; `refresh` callbacks run before each rendering and each snapshot. Not thread-safe."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._refreshers: list[Callable[[], None]] = []

    def add(self, family: Family) -> None:
        if family.name in self._families:
            raise ValueError(f"metric {family.name} exists already")
        self._families[family.name] = family

    def refresh_with(self, refresher: Callable[[], None]) -> Callable[[], None]:
        """Call `refresher` before each rendering; returns what ends that."""
        self._refreshers.append(refresher)
        return lambda: self._refreshers.remove(refresher)

    def render(self, page: str = "") -> str:
        """Everything that has a value, in Prometheus' text format 0.0.4; `page` is one of `PAGES`."""
        self._refresh()
        lines: list[str] = []
        for family in self._families.values():
            kind = family.kind if page == TRITON else family.plain_kind
            samples = list(family.samples(page)) if kind else []
            if samples:
                name = family.name_on(page)
                lines += [f"# HELP {name} {_escape(family.text, False)}", f"# TYPE {name} {kind}"]
                lines += samples
        return "\n".join(lines) + "\n" if lines else ""

    def snapshot(self) -> list[dict[str, Any]]:
        """Every family as plain data, which JSON can carry to `merge`."""
        self._refresh()
        return [family.snapshot() for family in self._families.values()]

    def merge(self, snapshot: Iterable[Mapping[str, Any]], kinds: Sequence[str] = tuple(KINDS)) -> None:
        """Add the values of another registry's snapshot, in families of these kinds; families come as needed."""
        for data in snapshot:
            if data["kind"] not in kinds or not data["values"]:
                continue
            family = self._families.get(data["name"])
            if family is None:
                bounds = {"bounds": data["bounds"]} if "bounds" in data else {}
                names = {"vllm": data.get("vllm", "")}
                family = KINDS[data["kind"]](self, data["name"], data["text"], data["labels"], **names, **bounds)
            for key, value in data["values"]:
                family.merge(tuple(key), value)

    def catalogue(self) -> list[tuple[str, str, str]]:
        """(name, type, help) of every family."""
        return [(family.name, family.kind, family.text) for family in self._families.values()]

    def _refresh(self) -> None:
        for refresher in self._refreshers:
            refresher()


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escape(value, True)}"' for name, value in pairs) + "}"


def _escape(text: str, quotes: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def number(value: float) -> str:
    """A value as the format writes it."""
    if value == float("inf"):
        return "+Inf"
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))


# ---- families that are set as it happens -----------------------------------------------------------------------------

DAEMON = Registry()
LATENCY = Histogram(
    DAEMON,
    "millhand_prediction_latency_seconds",
    "From the arrival of a window's closing reading to its committed prediction.",
    ["asset"],
    bounds=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
