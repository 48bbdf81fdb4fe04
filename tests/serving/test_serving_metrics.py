"""Metrics: valid exposition, and a page that lists every family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from millhand import node_metrics
from millhand.metrics import Counter, Gauge, Histogram, Registry
from millhand.serving.app import HTTP

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_page_lists_every_family_with_type_and_help():
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert listed == node_metrics.DAEMON.catalogue() + HTTP.catalogue()


def test_values_labels_and_escapes():
    registry = Registry()
    gauge = Gauge(registry, "temperature_celsius", "How\nwarm \\ cold.", ["where"])
    counter = Counter(registry, "hits_total", "Hits.")
    Gauge(registry, "never_set", "No sample, no lines.")
    gauge.set(21.5, where='the "hot"\nend\\')
    counter.inc()
    counter.inc(2)
    assert registry.render() == (
        "# HELP temperature_celsius How\\nwarm \\\\ cold.\n"
        "# TYPE temperature_celsius gauge\n"
        'temperature_celsius{where="the \\"hot\\"\\nend\\\\"} 21.5\n'
        "# HELP hits_total Hits.\n# TYPE hits_total counter\nhits_total 3\n"
    )
    with pytest.raises(ValueError, match="has labels"):
        gauge.set(1, place="x")
    with pytest.raises(ValueError, match="exists already"):
        Gauge(registry, "hits_total", "again")


def test_a_histogram_is_cumulative():
    registry = Registry()
    histogram = Histogram(registry, "size_rows", "Rows.", bounds=(1, 2, 4))
    for value, count in ((1, 3), (3, 2), (100, 1)):
        histogram.observe(value, count)
    lines = registry.render().splitlines()[2:]
    assert lines == [
        'size_rows_bucket{le="1"} 3', 'size_rows_bucket{le="2"} 3', 'size_rows_bucket{le="4"} 5',
        'size_rows_bucket{le="+Inf"} 6', "size_rows_sum 109", "size_rows_count 6",
    ]  # fmt: skip


def test_prometheus_own_parser_reads_it():
    parser = pytest.importorskip("prometheus_client.parser")
    registry = Registry()
    Gauge(registry, "a_bytes", "A.", ["x"]).set(float("inf"), x='q"\\\n')
    Histogram(registry, "b_seconds", "B.", ["x"], bounds=(0.5, 1)).observe(0.7, x="y")
    families = {family.name: family for family in parser.text_string_to_metric_families(registry.render())}
    assert families["a_bytes"].samples[0].labels == {"x": 'q"\\\n'}
    assert families["b_seconds"].type == "histogram"
    assert [sample.value for sample in families["b_seconds"].samples] == [0, 1, 1, 0.7, 1]
