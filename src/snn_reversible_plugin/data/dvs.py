"""The pixel of an event camera: from brightness over time to events.

The idea: a pixel remembers the log intensity at which it last fired, and fires again each time the
present one is a contrast threshold away from it: ON above, OFF below. Between two samples the log
intensity is taken as a straight line, so an event has a time of its own and does not sit on a
sample.

Source: the pixel is that of Lichtsteiner, Posch and Delbruck (IEEE JSSC 2008); interpolation and
refractory time are as in ESIM (Rebecq, Gehrig and Scaramuzza, CoRL 2018).
"""

import numpy as np
import numpy.typing as npt
from tonic.io import events_struct, make_structured_array

from snn_reversible_plugin.data.recordings import Events

Floats = npt.NDArray[np.float64]


def brightness_events(
    log_intensity: Floats,
    times: Floats,
    threshold: float | Floats = 0.2,
    refractory: float = 0.0,
    start: Floats | None = None,
) -> Events:
    """Fire the brightness-change events of a sensor that watches a film.

    Args:
        log_intensity: natural logarithm of the intensity, shape ``[K, H, W]``.
        times: when each sample was taken, in microseconds, shape ``[K]``, rising.
        threshold: contrast threshold, in units of log intensity, of all pixels or of each
            (shape ``[H, W]``).
        refractory: microseconds for which a pixel stays silent after an event. What it would have
            fired meanwhile is lost, as on the chip. 0 switches this off.
        start: the log intensity at which each pixel last fired, shape ``[H, W]``, less than a
            threshold away from the first sample; None takes the first sample itself.

    Returns:
        Structured array of tonic's event type (``x``, ``y`` int16, ``t`` int64 microseconds, ``p``
        bool, true for ON), sorted by time, then row, then column.

    Raises:
        ValueError: a shape that does not fit, times that do not rise, a threshold that is not
            positive, a negative refractory time, an intensity that is not finite, a start too far
            from the first sample.

    Example:
        >>> import numpy as np
        >>> ramp = np.linspace(0.0, 1.0, 11)[:, None, None]  # one pixel, growing brighter
        >>> events = brightness_events(ramp, 1000.0 * np.arange(11), threshold=0.3)
        >>> events["t"].tolist(), events["p"].tolist()
        ([3000, 6000, 9000], [True, True, True])
    """
    _check(log_intensity, times, threshold, refractory, start)
    # One pass in time, for the level depends on what was fired before it; all pixels at once.
    level = np.array(log_intensity[0] if start is None else start, dtype=float)
    # Of the interval that ends at sample k: how many events, negative for OFF, and its first level.
    fired = np.zeros(log_intensity.shape, dtype=np.int64)
    first = np.empty(log_intensity.shape)
    for k in range(1, len(times)):
        first[k] = level
        fired[k] = np.trunc((log_intensity[k] - level) / threshold)
        level += fired[k] * threshold

    i, y, x = np.nonzero(fired)
    count = fired[i, y, x]
    # An interval that fired n events becomes n rows, numbered from 1 up.
    rows = np.repeat(np.arange(len(count)), np.abs(count))
    earlier = np.cumsum(np.abs(count)) - np.abs(count)  # rows before each interval's first
    ordinal = np.arange(len(rows)) - earlier[rows] + 1
    i, y, x, count = i[rows], y[rows], x[rows], count[rows]
    step = np.broadcast_to(threshold, level.shape)[y, x] * np.sign(count)
    before, after = log_intensity[i - 1, y, x], log_intensity[i, y, x]
    crossing = (first[i, y, x] + ordinal * step - before) / (after - before)
    # Rounding may put a crossing a hair outside its interval.
    t = np.rint(times[i - 1] + np.clip(crossing, 0.0, 1.0) * (times[i] - times[i - 1]))

    events = make_structured_array(x, y, t, count > 0, dtype=events_struct)
    events = events[np.lexsort((x, y, t))]
    return _silence(events, level.shape[1], refractory) if refractory > 0 else events


def _silence(events: Events, width: int, refractory: float) -> Events:
    """Drop each event within ``refractory`` microseconds of a kept one of the same pixel."""
    last: dict[int, int] = {}
    keep = np.zeros(len(events), dtype=bool)
    pixels = events["y"].astype(int) * width + events["x"]
    for i, (pixel, t) in enumerate(zip(pixels.tolist(), events["t"].tolist(), strict=True)):
        if pixel not in last or t - last[pixel] >= refractory:
            keep[i] = True
            last[pixel] = t
    return events[keep]


def _check(
    log_intensity: Floats,
    times: Floats,
    threshold: float | Floats,
    refractory: float,
    start: Floats | None,
) -> None:
    if log_intensity.ndim != 3 or len(log_intensity) < 1:
        raise ValueError(
            f"log_intensity has shape {log_intensity.shape}: give [K, H, W] with K >= 1 samples"
        )
    if times.shape != log_intensity.shape[:1]:
        raise ValueError(
            f"times has shape {times.shape} for {len(log_intensity)} samples: give one for each"
        )
    if np.any(np.diff(times) <= 0):
        raise ValueError("times do not rise from sample to sample: sort them and drop repeated ones")
    if np.any(np.asarray(threshold) <= 0):
        raise ValueError(f"threshold is {np.min(threshold)}: a contrast threshold is above 0")
    if np.ndim(threshold) and np.shape(threshold) != log_intensity.shape[1:]:
        raise ValueError(
            f"threshold has shape {np.shape(threshold)}: give a number or one for each pixel, "
            f"{log_intensity.shape[1:]}"
        )
    if refractory < 0:
        raise ValueError(f"refractory is {refractory}: give microseconds, 0 to switch it off")
    if not np.isfinite(log_intensity).all():
        raise ValueError(
            "log_intensity holds values that are not finite: add a small constant to the intensity "
            "before taking its logarithm"
        )
    if start is not None:
        if start.shape != log_intensity.shape[1:]:
            raise ValueError(f"start has shape {start.shape}: give {log_intensity.shape[1:]}")
        if np.any(np.abs(start - log_intensity[0]) >= threshold):
            raise ValueError(
                "start is a threshold or more away from the first sample: such a pixel would have "
                "fired before it"
            )
