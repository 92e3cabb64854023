"""What workloads are given: spikes of synthetic speech, digits a pixel a step."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from benchmarks import recordings


def test_speech_is_small_and_whole():
    assert recordings.SPEECH.stat().st_size < 2**20
    with np.load(recordings.SPEECH) as stored:
        assert stored["energy"].shape == (160, 100, 64) and stored["energy"].dtype == np.uint8
        assert np.bincount(stored["label"]).tolist() == [8] * 20


def test_spikes_of_speech_are_bits_as_many_whatever_the_steps():
    few, many = (recordings.spoken_digits((steps, 8, 700)) for steps in (250, 1000))
    assert few.shape == (250, 8, 700) and set(few.unique().tolist()) == {0, 1}
    rates = [float(spikes.sum(0).mean()) for spikes in (few, many)]
    assert rates[0] > 1 and abs(rates[0] / rates[1] - 1) < 0.05
    assert not torch.equal(few[:, 0], few[:, 1])


def test_a_digit_is_shown_a_pixel_a_step():
    shown = recordings.sequential_digits((784, 3, 1))
    assert shown.shape == (784, 3, 1) and 0 == shown.min() < shown.max() <= 1
    # Each pixel of 8 x 8 is seen 3 or 4 times along a row of 28.
    first = shown[:28, 0, 0].unique_consecutive()
    assert first.tolist() == (torch.tensor(load_digits().images[0, 0]) / 16).unique_consecutive().tolist()
