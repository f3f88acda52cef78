"""The phi-accrual detector; the cases are those of Akka's AccrualFailureDetectorSpec."""

import math
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.messaging.phi import MINIMUM_DEVIATION_SECONDS, THRESHOLD, Arrivals, phi


def cumulative(value: float) -> float:
    return 1 - 10 ** -phi(value, 0, 1)


@pytest.mark.parametrize(
    ("value", "probability"),
    [(0.0, 0.5), (0.6, 0.7257), (1.5, 0.9332), (2.0, 0.97725), (2.5, 0.9938), (3.5, 0.9998)],
)
def test_it_follows_the_normal_distribution(value: float, probability: float) -> None:
    assert cumulative(value) == pytest.approx(probability, abs=0.001)
    assert cumulative(-value) == pytest.approx(1 - probability, abs=0.001)


@pytest.mark.parametrize("silence", [-1e9, -25.0, 25.0, 26.0, 40.0, 1e9])
def test_outliers_are_no_exceptions(silence: float) -> None:
    value = phi(silence, 0, 1)
    assert math.isfinite(value)
    assert (value > 80) if silence > 0 else (value == pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize(
    ("silence", "expected"),
    [(0, 0.0), (500, 0.1), (1_000, 0.3), (1_200, 1.6), (1_400, 4.7), (1_600, 10.8), (1_700, 15.3)],
)
def test_values_are_realistic(silence: float, expected: float) -> None:
    assert phi(silence, 1_000, 100) == pytest.approx(expected, abs=0.1)


def test_a_larger_deviation_is_less_suspicious() -> None:
    assert phi(1_100, 1_000, 500) < phi(1_100, 1_000, 100)


@given(st.floats(-100, 100), st.floats(0, 100), st.floats(0.1, 10), st.floats(0, 10))
def test_the_longer_the_silence_the_more_suspicious(
    silence: float, mean: float, deviation: float, longer: float
) -> None:
    assert phi(silence + longer, mean, deviation) >= phi(silence, mean, deviation) - 1e-9


def arrivals(*, pause: float = 0.0) -> Arrivals:
    return Arrivals(interval_seconds=1.0, pause_seconds=pause)


def heard(detector: Arrivals, *gaps: float) -> float:
    """Beat after each gap; return when the last one came."""
    for now in accumulate(gaps):
        detector.beat(now)
    return sum(gaps)


def test_before_the_first_beat_nobody_is_suspected() -> None:
    assert arrivals().phi(1e9) == 0.0


def test_after_one_beat_the_interval_is_the_guess() -> None:
    detector = arrivals()
    heard(detector, 0)
    assert detector.phi(1) == pytest.approx(0.3, abs=0.2)
    assert detector.phi(2) == pytest.approx(4.5, abs=0.3)
    assert detector.phi(3) > 15


def test_after_a_series_of_beats_it_is_alive_and_after_a_missed_one_it_is_not() -> None:
    detector = arrivals()
    now = heard(detector, 0, 1, 0.1, 0.1)
    assert detector.phi(now + 0.1) < 3
    assert detector.phi(now + 7) > 3


def test_it_is_alive_again_when_it_beats_again() -> None:
    detector = arrivals(pause=3)
    now = heard(detector, *[1.0] * 100)
    assert detector.phi(now + 300) > THRESHOLD
    detector.beat(now + 300)
    assert detector.phi(now + 300.9) < THRESHOLD
    for later in range(10):
        detector.beat(now + 301 + later)
    assert detector.phi(now + 318) > THRESHOLD, "the long gap has taught it nothing"


def test_an_acceptable_pause_is_accepted_and_no_more() -> None:
    detector = arrivals(pause=3)
    now = heard(detector, 0, *[1.0] * 5)
    assert detector.phi(now + 3.9) < THRESHOLD
    assert detector.phi(now + 5.5) > THRESHOLD


def test_only_the_newest_intervals_count() -> None:
    slow_once, fast = arrivals(), arrivals()
    now = heard(slow_once, *[1.5] * 50, *[0.6] * 200)
    assert now == pytest.approx(195)
    then = heard(fast, *[0.6] * 201)
    assert slow_once.phi(now + 0.9) == pytest.approx(fast.phi(then + 0.9), abs=0.2)


def test_a_beat_out_of_turn_teaches_nothing() -> None:
    """A process beats at once when it has news; its next silence is no less suspicious."""
    regular, eager = arrivals(pause=3), arrivals(pause=3)
    now = heard(regular, *[1.0] * 10)
    then = heard(eager, *[1.0, 0.01, 0.02, 0.97] * 4)
    assert regular.phi(now + 4.7) > THRESHOLD
    assert eager.phi(then + 4.7) > THRESHOLD


def test_silence_that_we_could_not_hear_is_nobodys_fault() -> None:
    detector = arrivals(pause=3)
    now = heard(detector, *[1.0] * 10)
    detector.count_from(now + 600)
    assert detector.phi(now + 601) < 1
    assert detector.last == now + 600


def test_a_regular_beat_has_the_least_deviation() -> None:
    detector = arrivals(pause=3)
    now = heard(detector, *[1.0] * 300)
    expected = phi(4.3, 4.0, MINIMUM_DEVIATION_SECONDS)
    assert detector.phi(now + 4.3) == pytest.approx(expected, abs=0.01)


def test_twenty_thousand_beats_with_pauses_up_to_three_seconds_accuse_nobody() -> None:
    """Most beats are regular, each hundredth is late by up to three seconds."""
    from random import Random  # noqa: PLC0415 - seeded, for this alone

    chance = Random(7)
    detector = arrivals(pause=3)
    gaps = (
        1 + chance.uniform(0, 3) if chance.random() < 0.01 else chance.gauss(1, 0.02)
        for _ in range(20_000)
    )
    accused = 0
    for before, now in pairwise(accumulate(gaps)):
        accused += detector.phi(now) >= THRESHOLD and now - before <= 4
        detector.beat(now)
    assert accused <= 1
