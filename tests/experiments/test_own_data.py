"""One's own networks and data, once with tiny settings, and what is known of the data that are made by formula."""

import numpy as np
import pytest
import torch

from experiments import own_data


def test_the_best_classifier_of_the_waveforms_is_right_86_times_in_100():
    signals, classes = own_data.waveforms(4000, seed=3)
    triangles = np.maximum(6 - abs(np.arange(1, 22) - np.array([[7], [15], [11]])), 0)
    share = np.linspace(0, 1, 41)[:, None]
    density = [
        np.exp(-np.square(signals - (share * triangles[a] + (1 - share) * triangles[b])).sum(2) / 2).sum(1)
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert (np.argmax(density, 0) == classes).mean() == pytest.approx(0.86, abs=0.015)


def test_oscillations_without_decay_are_sines_of_their_frequency():
    signals, targets = own_data.oscillations(2000, seed=0)
    steady = signals[targets[:, 1] < 0.02].squeeze(1)
    spectrum = torch.fft.rfft(steady, n=4000).abs()
    found = spectrum.argmax(1) * 39 / 4000 / 4  # 40 points in a unit of time, 39 steps; 4 times the mean frequency
    torch.testing.assert_close(found, targets[targets[:, 1] < 0.02, 0], atol=0.06, rtol=0)
