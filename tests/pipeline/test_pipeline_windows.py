"""Windows: the stated rules one by one, and two laws over any stream: order does not matter, nor does a restart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.pipeline.windows import WindowBuilder
from millhand.records import AssetState, Batch, Quality

STEPS = 30
LATENESS_S = 0.5
NAN = math.nan


def values(window: Any, name: str = "x") -> list[float]:
    return window.signals[name].tolist()


# ---- laws -----------------------------------------------------------------------------------------------------------


@st.composite
def stream(draw: st.DrawFn) -> list[tuple[float, str, float]]:
    """(second, name, value) in order of time: two signals, jittered times, holes."""
    rows = []
    for step in range(STEPS):
        second = round(step * 0.1 + draw(st.integers(-30, 30)) / 1000, 3)
        rows += [(second, name, float(draw(st.integers(-5, 5)))) for name in ("x", "y") if draw(st.integers(0, 9))]
    return rows


@given(stream(), st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 5, "step": 2, "min_length": 2},
        {"by": "time", "length": 0.7, "step": 0.25, "min_length": 0.2},
    ],
    ids=["count", "time"],
)
def test_any_order_within_the_lateness_gives_the_same_windows(kit, shape, rows, data) -> None:
    spec = kit.spec(signals=("x", "y"), lateness_s=LATENESS_S, max_gap_s=0.35, **shape)
    last = kit.batch(kit.reading(100.0))  # closes every step
    straight = [kit.batch(kit.reading(second, value, name)) for second, name, value in rows]
    expected = kit.windows_of(WindowBuilder("pump", spec), [*straight, last])

    delayed = [(second + data.draw(st.integers(0, 490)) / 1000, second, name, value) for second, name, value in rows]
    again = [(arrival + 0.005, *row) for arrival, *row in delayed if data.draw(st.booleans())]
    arrived = [kit.reading(second, value, name) for _, second, name, value in sorted(delayed + again)]
    builder, found = WindowBuilder("pump", spec), []
    while arrived:
        size = data.draw(st.integers(1, 5))
        found += builder.add(kit.batch(*arrived[:size]))
        del arrived[:size]
    found += builder.add(last)

    assert [kit.plain(window) for window in found] == [kit.plain(window) for window in expected]
    assert builder.counters.duplicates == len(again)
    assert builder.counters.late == 0


@st.composite
def any_batches(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Batches of a badly behaved source: time stands still, jumps both ways, loses sync, boots; values of any kind."""
    second, boot, synced = 1000.0, 0, True
    batches = []
    for _ in range(draw(st.integers(5, 25))):
        second += draw(st.sampled_from([0.1, 0.1, 0.1, 0.1, 0.0, 0.35, 3.0, -0.2, -40.0, 500.0]))
        event = draw(st.integers(0, 20))
        boot, synced = boot + (event == 0), synced ^ (event == 1)
        batches.append(
            {
                "second": round(second, 3),
                "boot": str(boot),
                "synced": synced,
                "x": draw(st.sampled_from([1.0, 2, True, NAN, math.inf, 10**400, "off", None, 5000.0])),
                "quality": draw(st.sampled_from([Quality.GOOD, Quality.GOOD, Quality.BAD, Quality.STALE])),
                "state": draw(st.sampled_from([None, AssetState.IDLE, AssetState.RUNNING])),
                "waves": draw(st.sets(st.sampled_from(["v", "w"]))),
            }
        )
    return batches


def build(kit: Any, rows: list[dict[str, Any]]) -> list[Batch]:
    batches = []
    for row in rows:
        clock = kit.clock(row["second"], boot_id=row["boot"], synced=row["synced"])
        waves = tuple(kit.snapshot(0, name, row["second"], clock=clock) for name in sorted(row["waves"]))
        first = kit.reading(0, row["x"], clock=clock, quality=row["quality"])
        batches.append(kit.batch(first, kit.reading(0, 3.0, "y", clock=clock), state=row["state"], waveforms=waves))
    return batches


@given(any_batches(), st.data())
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 4, "step": 1, "lateness_s": 0.2, "max_gap_s": 5.0},
        {"by": "time", "length": 0.5, "step": 0.2, "min_length": 0.1},
        {"length": 2, "step": 1, "min_length": 1, "waveforms": ("v", "w"), "max_gap_s": 2.0},
    ],
    ids=["count", "time", "waveforms"],
)
def test_a_restart_at_any_batch_changes_nothing(kit, shape, rows, data) -> None:
    def fresh() -> WindowBuilder:
        return WindowBuilder("pump", kit.spec(signals=("x", "y"), **shape), limits={"x": (-100, 100)})

    undisturbed, restarted = fresh(), fresh()
    for one in build(kit, rows):
        if data.draw(st.booleans()):
            restarted = kit.reloaded(restarted, fresh())
        expected = [kit.plain(window) for window in undisturbed.add(one)]
        assert [kit.plain(window) for window in restarted.add(one)] == expected
        assert restarted.counters == undisturbed.counters
        for window in expected:
            assert list(window[2]) == sorted(set(window[2])), "times rise"


# ---- rules ----------------------------------------------------------------------------------------------------------


def test_windows_by_count_begin_at_the_shortest_history_and_slide(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=3, step=2, min_length=2))
    found = kit.windows_of(builder, [kit.batch(kit.reading(second, float(second))) for second in range(7)])
    assert [values(window) for window in found] == [[0, 1], [1, 2, 3], [3, 4, 5]]
    assert [window.complete for window in found] == [False, True, True]
    assert [window.end_ns for window in found] == [kit.at(1), kit.at(3), kit.at(5)]


def test_windows_by_time_need_no_step_that_divides_their_length(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(by="time", length=1.0, step=0.5))
    found = kit.windows_of(builder, [kit.batch(kit.reading(0.3 * step, float(step))) for step in range(9)])
    assert [values(window) for window in found] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert all(window.complete for window in found)


def test_a_batch_with_many_steps_gives_every_window_in_it(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2))
    found = builder.add(kit.batch(*(kit.reading(second, float(second)) for second in range(5))))
    assert [values(window) for window in found] == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_signals_that_miss_a_step_are_nan_there(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2, signals=("x", "y")))
    (window,) = kit.windows_of(builder, [kit.batch(kit.reading(0)), kit.batch(kit.reading(1, 2.0, "y"))])
    assert values(window) == pytest.approx([1, NAN], nan_ok=True)
    assert values(window, "y") == pytest.approx([NAN, 2], nan_ok=True)


def test_readings_that_come_too_late_are_dropped_and_counted(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=3, lateness_s=1.0))
    times = [0, 1, 3, 1.5, 2.5, 4]  # 1.5 and 2.5 come after 3, and each is newer than the newest closed step
    found = kit.windows_of(builder, [kit.batch(kit.reading(second, second)) for second in times])
    assert [values(window) for window in found] == [[0, 1, 1.5], [1, 1.5, 2.5], [1.5, 2.5, 3]]
    assert builder.counters.late == 0
    builder.add(kit.batch(kit.reading(2.7)))
    assert builder.counters.late == 1


def test_the_first_usable_value_of_a_time_wins(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=1))
    bad = kit.reading(0, 9.0, quality=Quality.BAD)
    (window,) = builder.add(kit.batch(bad, kit.reading(0, 1.0), kit.reading(0, 2.0)))
    assert values(window) == [1]
    assert builder.counters.duplicates == 2
    assert builder.add(kit.batch(kit.reading(0, 3.0))) == []
    assert builder.counters.duplicates == 3


def test_more_signals_than_bits_in_a_float_are_told_apart(kit) -> None:
    names = tuple(f"s{number}" for number in range(1100))
    builder = WindowBuilder("pump", kit.spec(length=1, signals=names))
    (window,) = builder.add(kit.batch(*(kit.reading(0, float(number), name) for number, name in enumerate(names))))
    assert [window.signals[name][0] for name in names] == list(range(1100))
    assert builder.counters.duplicates == 0


def test_a_hole_begins_the_window_anew(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=3, max_gap_s=5.0))
    found = kit.windows_of(builder, [kit.batch(kit.reading(second, second)) for second in [0, 1, 2, 8, 9, 10]])
    assert [values(window) for window in found] == [[0, 1, 2], [8, 9, 10]]
    assert builder.counters.gaps == 1


def test_a_clock_that_is_set_back_begins_the_window_anew(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2))
    found = kit.windows_of(builder, [kit.batch(kit.reading(second, second)) for second in [100, 101, 3, 4]])
    assert [values(window) for window in found] == [[100, 101], [3, 4]]
    assert builder.counters.clock_resets == 1


def test_steps_before_a_break_in_the_same_batch_are_judged(kit) -> None:
    """A file read in large batches gives the windows that it gives in small ones."""
    seconds = [100, 101, 102, 103, 10, 11, 12, 13]
    later = [kit.clock(second, synced=False, boot_id="two") for second in range(5)]
    readings = [kit.reading(second) for second in seconds] + [kit.reading(0, clock=clock) for clock in later]
    for lateness_s in (0, 2):
        spec = kit.spec(lateness_s=lateness_s)
        at_once = WindowBuilder("pump", spec).add(kit.batch(*readings))
        one_by_one = WindowBuilder("pump", spec)
        singly = [window for one in readings for window in one_by_one.add(kit.batch(one))]
        assert [kit.plain(window) for window in at_once] == [kit.plain(window) for window in singly]
        assert [window.end_ns for window in at_once[:4]] == [kit.at(second) for second in (102, 103, 12, 13)]


def test_a_clock_that_slips_back_a_little_is_late_not_reset(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2))
    found = kit.windows_of(builder, [kit.batch(kit.reading(second, second)) for second in [100, 101, 99, 102]])
    assert [values(window) for window in found] == [[100, 101], [101, 102]]
    assert (builder.counters.late, builder.counters.clock_resets) == (1, 0)


def test_an_asset_that_wakes_up_in_1970_is_judged_and_so_is_its_return(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2, max_gap_s=60.0))
    epoch = [kit.reading(0, float(second), clock=kit.clock(0, source_ns=second * kit.SECOND_NS)) for second in (1, 2)]
    later = [kit.reading(second, float(second)) for second in (3, 4)]
    found = kit.windows_of(builder, [kit.batch(one) for one in [*epoch, *later, *epoch]])
    assert [values(window) for window in found] == [[1, 2], [3, 4], [1, 2]]
    assert (builder.counters.gaps, builder.counters.clock_resets) == (1, 1)


def test_an_unsynced_source_runs_on_the_monotonic_clock_of_one_boot(kit) -> None:
    def unsynced(monotonic_s: float, boot: str) -> Any:
        wall_ns = kit.at(-1e6 * monotonic_s)  # a wall clock that runs wild
        clock = kit.clock(monotonic_s, boot_id=boot, synced=False, source_ns=wall_ns, receive_ns=wall_ns)
        return kit.batch(kit.reading(0, monotonic_s, clock=clock))

    builder = WindowBuilder("pump", kit.spec(length=2))
    boots = [unsynced(50, "one"), unsynced(51, "one"), unsynced(52, "two"), unsynced(53, "two")]
    found = kit.windows_of(builder, boots)
    assert [values(window) for window in found] == [[50, 51], [52, 53]]
    assert [window.end_ns for window in found] == [kit.at(-50e6 + 1), kit.at(-52e6 + 1)], "dated once a boot"
    assert (builder.counters.gaps, builder.counters.clock_resets) == (1, 0)
    synced = [kit.batch(kit.reading(second, float(second))) for second in (54, 55)]
    assert [values(window) for window in kit.windows_of(builder, synced)] == [[54, 55]]
    assert builder.counters.gaps == 2


@pytest.mark.parametrize(
    "value", [NAN, math.inf, -math.inf, 1e300, -300, 10**400, "nan", "12", None], ids=lambda value: str(value)[:8]
)
def test_a_value_that_is_no_plausible_number_is_nan(kit, value) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2), limits={"x": (-273.15, 2000.0)})
    (window,) = builder.add(kit.batch(kit.reading(0), kit.reading(1, value)))
    assert values(window) == pytest.approx([1, NAN], nan_ok=True)
    missing = value in (None, "nan", "12") or value is NAN
    assert builder.counters.implausible == (0 if missing else 1)


def test_flags_and_whole_numbers_are_numbers(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=3))
    (window,) = builder.add(kit.batch(kit.reading(0, True), kit.reading(1, 7), kit.reading(2, False)))
    assert values(window) == [1, 7, 0]


def test_a_long_run_keeps_only_what_the_window_needs(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=50))
    for second in range(5000):
        found = builder.add(kit.batch(kit.reading(second, float(second))))
    assert values(found[0]) == [float(second) for second in range(4950, 5000)]
    assert len(builder.dump().times_ns) == 50 * 8


# ---- waveforms ------------------------------------------------------------------------------------------------------


def test_a_window_is_due_once_for_each_complete_set_of_snapshots(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2, min_length=1, waveforms=("v", "w")))
    batches = [
        kit.batch(kit.reading(0)),
        kit.batch(kit.reading(1), waveforms=(kit.snapshot(1, "v", 1.0),)),
        kit.batch(kit.reading(2), waveforms=(kit.snapshot(2, "v", 2.0), kit.snapshot(1.9, "w", 3.0))),
        kit.batch(kit.reading(3), waveforms=(kit.snapshot(2, "v", 2.0), kit.snapshot(1.9, "w", 3.0))),
        kit.batch(kit.reading(4), waveforms=(kit.snapshot(4, "v", quality=Quality.BAD), kit.snapshot(4, "w"))),
    ]
    (window,) = kit.windows_of(builder, batches)
    assert (window.end_ns, values(window)) == (kit.at(2), [1, 1])
    assert {name: float(wave.array[0]) for name, wave in window.waveforms.items()} == {"v": 2.0, "w": 3.0}
    assert builder.counters.duplicates == 2


def test_a_batch_with_many_snapshots_gives_a_window_for_each(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(signals=(), waveforms=("v",)))
    found = builder.add(kit.batch(waveforms=tuple(kit.snapshot(second) for second in range(4))))
    assert [window.end_ns for window in found] == [kit.at(second) for second in range(4)]
    assert all(window.complete and window.start_ns == window.end_ns for window in found)


def test_channels_that_fell_out_of_step_meet_again(kit) -> None:
    """A slow reader missed w's snapshot of second 2; from then on it reads w's before v's of the same second."""
    builder = WindowBuilder("pump", kit.spec(signals=(), waveforms=("v", "w")))
    read = [
        (1, "v"),
        (1, "w"),
        (2, "v"),
        (3, "w"),
        (3, "v"),
        (4, "w"),
        (4, "v"),
        (5, "w"),
        (5, "v"),
        (6, "w"),
        (6, "v"),
    ]
    found = kit.windows_of(builder, [kit.batch(waveforms=(kit.snapshot(second, name),)) for second, name in read])
    ends_s = [{name: wave.clock.source_ns for name, wave in window.waveforms.items()} for window in found]
    whole = [{name: kit.at(second) for name in "vw"} for second in (1, 4, 5, 6)]
    assert ends_s == [whole[0], {"v": kit.at(2), "w": kit.at(3)}, *whole[1:]]
    assert builder.counters.unpaired == 1, "v's of second 3, whose partner had gone with v's of second 2"


@pytest.mark.parametrize(("offset_s", "synced"), [(0.4, True), (0.5, True), (0.6, True), (0.7, False)])
def test_channels_that_are_never_taken_together_are_judged_as_often_as_they_come(kit, offset_s, synced) -> None:
    builder = WindowBuilder("pump", kit.spec(signals=(), waveforms=("v", "w")))
    times = [(second + offset, name) for second in range(1, 9) for offset, name in ((0, "v"), (offset_s, "w"))]
    batches = [
        kit.batch(waveforms=(kit.snapshot(0, name, clock=kit.clock(time_s, synced=synced)),)) for time_s, name in times
    ]
    assert len(kit.windows_of(builder, batches)) >= 7


def test_snapshots_alone_survive_a_clock_set_back_and_a_new_boot(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(signals=(), waveforms=("v", "w")))

    def both(second: float, **changes: Any) -> Any:
        clock = kit.clock(second, **changes)
        return kit.batch(waveforms=(kit.snapshot(0, "v", clock=clock), kit.snapshot(0, "w", clock=clock)))

    found = kit.windows_of(builder, [both(100), both(3), both(50, synced=False), both(1, synced=False, boot_id="two")])
    assert len(found) == 4
    assert (builder.counters.clock_resets, builder.counters.gaps) == (1, 2)


def test_readings_that_stopped_do_not_explain_a_later_snapshot(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(by="time", length=2.0, min_length=1.0, waveforms=("v",)))
    batches = [kit.batch(kit.reading(second)) for second in (0, 1, 2)]
    assert kit.windows_of(builder, [*batches, kit.batch(waveforms=(kit.snapshot(3),))])
    assert not builder.add(kit.batch(waveforms=(kit.snapshot(90),)))
    assert builder.counters.gaps == 1


# ---- state ----------------------------------------------------------------------------------------------------------


def test_the_state_of_another_model_is_left_alone(kit) -> None:
    old = WindowBuilder("pump", kit.spec(length=3, signals=("x",)))
    kit.windows_of(old, [kit.batch(kit.reading(second)) for second in range(3)])
    new = kit.reloaded(old, WindowBuilder("pump", kit.spec(length=3, signals=("y",))))
    assert new.add(kit.batch(kit.reading(3, 1.0, "y"))) == []


def test_the_asset_state_holds_until_the_next_one(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=1))
    batches = [kit.batch(kit.reading(0)), kit.batch(kit.reading(1), state=AssetState.IDLE), kit.batch(kit.reading(2))]
    states = [window.state for window in kit.windows_of(builder, batches)]
    assert states == [AssetState.UNKNOWN, AssetState.IDLE, AssetState.IDLE]


def test_windows_do_not_change_after_they_were_given(kit) -> None:
    builder = WindowBuilder("pump", kit.spec(length=2))
    first = kit.windows_of(builder, [kit.batch(kit.reading(second, float(second))) for second in (0, 1)])[0]
    kit.windows_of(builder, [kit.batch(kit.reading(second, float(second))) for second in range(2, 200)])
    assert values(first) == [0, 1]
    assert first.times_ns.dtype == np.int64
