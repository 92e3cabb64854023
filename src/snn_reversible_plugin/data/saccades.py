"""Event recordings of real handwritten digits that need no download.

The idea: N-MNIST was made by moving a camera before a picture along three small saccades.
scikit-learn ships 1797 scanned digits; the same movement is simulated here before a simulated event
camera (`dvs`), so a recording is made from its index and a seed in a few milliseconds, the same one
each time.

Source: the digits are those of Alpaydin and Kaynak (UCI, 1998), through
`sklearn.datasets.load_digits`; the saccades are those of Orchard et al. (Front. Neurosci. 2015):
the image moves (3.5, 7), (3.5, -7) and (-7, 0) of 34 pixels in 105 ms each.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from snn_reversible_plugin.data.dvs import Floats, brightness_events
from snn_reversible_plugin.data.recordings import Events, Recordings

# Corners of the path, as parts of the sensor's width: a triangle that ends where it began.
_CORNERS = np.array([(0.0, 0.0), (3.5, 7.0), (7.0, 0.0), (0.0, 0.0)]) / 34
_SACCADE_US = 105_000.0
_SAMPLES = 42  # in a saccade: at most 0.45 pixels of 34 between two, less than the blur
_DIGIT = 20 / 34  # the digit's box, as a part of the sensor's width
_BLUR = 0.6  # standard deviation of the lens's point spread, in pixels of the 8x8 digit
_DARK = 0.1  # intensity of the paper, where full ink adds 1
_MISMATCH = 0.03  # standard deviation of the threshold from pixel to pixel, as on a chip
_TRAIN = 1437  # of 1797; cut, not drawn, since neighbours may be of one writer


class DigitSaccades(Recordings):
    """Handwritten digits seen by an event camera that makes three small saccades.

    Item ``i`` is ``(events, digit)``: a structured array of tonic's event type (``x``, ``y``, ``t``
    in microseconds from 0 to 315,000, ``p`` true for ON), sorted by time, and an int from 0 to 9.
    The training part is the first 1437 digits, the test part the last 360.

    Args:
        train: the training part, or the test part.
        size: width and height of the sensor in pixels, at least 8; `sensor_size` is
            ``(size, size, 2)``.
        threshold: contrast threshold in units of log intensity. At 0.3 and 34 pixels a recording
            has about 5,000 events, nearly as in N-MNIST.
        refractory: microseconds for which a pixel is silent after an event.
        seed: draws the mismatch of the pixels' thresholds and, together with the index, where the
            digit starts (within half a pixel of the digit) and at what level each pixel does.
        limit: keep only the first so many recordings of the part.
        transform, target_transform, transforms: of the events, of the digit, of both, as tonic has
            it.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument out of its range.
        IndexError: an index beyond the part.

    Example:
        >>> from tonic.transforms import ToFrame
        >>> from snn_reversible_plugin.data import DigitSaccades
        >>> data = DigitSaccades(transform=ToFrame(DigitSaccades.sensor_size, n_time_bins=10))
        >>> frames, digit = data[0]
        >>> frames.shape, digit
        ((10, 2, 34, 34), 0)
    """

    def __init__(
        self,
        train: bool = True,
        *,
        size: int = 34,
        threshold: float = 0.3,
        refractory: float = 0.0,
        seed: int = 0,
        limit: int | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(train, limit, transform, target_transform, transforms)
        if size < 8:
            raise ValueError(f"size is {size}: the digits have 8x8 pixels, give at least 8")
        if threshold <= 0 or refractory < 0:
            raise ValueError(
                f"threshold is {threshold} and refractory {refractory}: "
                "the first must be above 0, the second not below it"
            )
        images, digits = _scanned_digits()
        part = slice(_TRAIN) if train else slice(_TRAIN, None)
        self.sensor_size = (size, size, 2)
        self.threshold, self.refractory, self.seed = threshold, refractory, seed
        self.data = images[part][:limit]
        self.targets = digits[part][:limit].tolist()
        self._first = 0 if train else _TRAIN  # so that no two digits of the parts share their draws
        noise = np.random.default_rng(seed).normal(1.0, _MISMATCH, (size, size))
        self._thresholds = threshold * np.clip(noise, 0.5, 1.5)

    def __repr__(self) -> str:
        return (
            f"DigitSaccades(train={self.train}, size={self.sensor_size[0]}, "
            f"threshold={self.threshold}, refractory={self.refractory}, seed={self.seed}, "
            f"limit={len(self)})"
        )

    def _record(self, index: int) -> Events:
        draws = np.random.default_rng([self.seed, self._first + index])
        times, film = _film(self.data[index], self.sensor_size[0], draws.uniform(-0.5, 0.5, 2))
        # The path ends where it began: pixels that had just fired there would all fire at the very
        # end. They fired some time before, somewhere within half a threshold.
        start = film[0] + self._thresholds * draws.uniform(-0.5, 0.5, film[0].shape)
        return brightness_events(film, times, self._thresholds, self.refractory, start)


def _film(image: Floats, size: int, start: Floats) -> tuple[Floats, Floats]:
    """Times ``[K]`` in microseconds and log intensity ``[K, size, size]`` of a digit on its way.

    ``image`` has ink from 0 to 1; ``start`` displaces it, (x, y) in pixels of the digit.
    """
    # Each saccade speeds up and slows down: half a cosine from corner to corner.
    ease = (1 - np.cos(np.pi * np.arange(_SAMPLES) / _SAMPLES)) / 2
    legs = [a + ease[:, None] * (b - a) for a, b in pairwise(_CORNERS)]
    path = np.concatenate([*legs, _CORNERS[-1:]]) * size
    times = np.linspace(0.0, 3 * _SACCADE_US, len(path))

    # A translated picture seen through a Gaussian lens is separable: one small matrix for the rows
    # and one for the columns of each sample.
    scale = size * _DIGIT / 8
    margin = size * (1 - _DIGIT - _CORNERS.max()) / 2  # centres the path's box on the sensor

    def lens(shift: Floats) -> Floats:  # [K] -> [K, size, 8]
        source = (np.arange(size)[None, :, None] + 0.5 - margin - shift[:, None, None]) / scale
        distance = source - (np.arange(8) + 0.5)
        weight: Floats = np.exp(-0.5 * (distance / _BLUR) ** 2) / (_BLUR * np.sqrt(2 * np.pi))
        return weight

    columns, rows = lens(path[:, 0] + scale * start[0]), lens(path[:, 1] + scale * start[1])
    film: Floats = np.log(_DARK + rows @ image @ columns.transpose(0, 2, 1))
    return times, film


def _scanned_digits() -> tuple[Floats, Any]:
    """The 1797 digits, ``[1797, 8, 8]`` with ink from 0 to 1, and what they are, ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitSaccades takes its digits from scikit-learn, which could not be imported "
            f"({error}): pip install 'snn-reversible-plugin[data]'",
            name=error.name,
        ) from error
    digits = load_digits()
    return digits.images / 16, digits.target
