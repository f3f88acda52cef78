"""How unlikely it is that a process is alive, by how long its heartbeats have been away.

The phi-accrual failure detector (Hayashibara et al., 2004), with the approximation of the normal
distribution and the acceptable pause that Akka uses.
"""

import math
from collections import deque

THRESHOLD = 8.0
"""From here on a process is suspected: with a normal distribution, wrongly once in 100 million."""
MINIMUM_DEVIATION_SECONDS = 0.1
SAMPLES = 200


def phi(silent_seconds: float, mean_seconds: float, deviation_seconds: float) -> float:
    """Return -log10 of the probability that a heartbeat comes even later than this.

    Args:
        silent_seconds: Since the last heartbeat.
        mean_seconds: Between two heartbeats, with the pause that is acceptable.
        deviation_seconds: Of that; more than zero.
    """
    y = (silent_seconds - mean_seconds) / deviation_seconds
    # The logistic approximation of the normal distribution; beyond this it is all or nothing.
    exponent = max(-700.0, min(700.0, -y * (1.5976 + 0.070566 * y * y)))
    e = math.exp(exponent)
    if silent_seconds > mean_seconds:
        return -math.log10(e / (1.0 + e))
    return 0.0 - math.log10(1.0 - 1.0 / (1.0 + e))  # a minus alone would make -0.0


class Arrivals:
    """When one process's heartbeats came, and how suspicious its silence is.

    Args:
        interval_seconds: How often they should come; the guess until two have come.
        pause_seconds: How long they may stay away.
    """

    def __init__(self, *, interval_seconds: float, pause_seconds: float) -> None:
        self._pause = pause_seconds
        self._shortest = interval_seconds / 2
        # Until there is more to go by: the interval, give or take a quarter of it.
        quarter = interval_seconds / 4
        self._intervals = deque(
            [interval_seconds - quarter, interval_seconds + quarter], maxlen=SAMPLES
        )
        self._last: float | None = None

    @property
    def last(self) -> float | None:
        """When the last one came, in seconds of the caller's clock."""
        return self._last

    def beat(self, now: float) -> None:
        """Count a heartbeat.

        An interval longer than was acceptable teaches nothing, nor does one that is much too short:
        a process beats out of turn when it has news, and that says nothing of its regularity.
        """
        if self._last is not None:
            interval = now - self._last
            if self._shortest <= interval <= self._mean + self._pause:
                self._intervals.append(interval)
        self._last = now

    def count_from(self, now: float) -> None:
        """Begin the silence here, and learn nothing from what was before: we did not hear it."""
        self._last = now

    def phi(self, now: float) -> float:
        """Return how suspicious the silence is; 0 before the first heartbeat."""
        if self._last is None:
            return 0.0
        return phi(now - self._last, self._mean + self._pause, self._deviation)

    @property
    def _mean(self) -> float:
        return sum(self._intervals) / len(self._intervals)

    @property
    def _deviation(self) -> float:
        mean = self._mean
        variance = sum((i - mean) ** 2 for i in self._intervals) / len(self._intervals)
        return max(MINIMUM_DEVIATION_SECONDS, math.sqrt(variance))
