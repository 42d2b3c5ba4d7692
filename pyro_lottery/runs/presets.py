"""The presets of the options, by name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"train_samples": 10},
    "fast": {"levels": 9, "prune_fraction": 0.4},
    "reduced": {
        "train_size": 2000, "test_size": 1000, "batch_size": 50, "epochs": 10, "milestones": (5, 8),
        "levels": 5, "prune_fraction": 0.6,
    },
    "minimal": {
        "train_size": 1000, "test_size": 500, "batch_size": 25, "epochs": 8, "milestones": (4, 6),
        "levels": 5, "prune_fraction": 0.6,
    },
    "evidence": {
        "test_size": 5000, "epochs": 5, "milestones": (3, 4), "lr": 2e-3, "levels": 4, "prune_fraction": 0.65,
    },
    "evidence_small": {
        "train_size": 2500, "test_size": 2000, "batch_size": 50, "epochs": 8, "milestones": (5, 7),
        "levels": 4, "prune_fraction": 0.65,
    },
    "costs": {
        "train_size": 512, "test_size": 500, "epochs": 3, "milestones": (), "levels": 4, "prune_fraction": 0.65,
        "train_samples": 10,
    },
    "quick": {
        "dataset": "digits", "levels": 2, "prune_fraction": 0.5, "epochs": 4, "milestones": (3,), "batch_size": 64,
    },
    "smoke": {
        "dataset": "digits", "train_size": 60, "test_size": 60, "batch_size": 30, "epochs": 1, "milestones": (),
        "levels": 2, "prune_fraction": 0.6, "eval_samples": 2,
    },
}  # fmt: skip
"""Options of each preset that differ from the defaults.

The defaults are the paper's except for ``train_samples``: one weight sample per batch instead of ten lets a network learn far
more in the same time (experiments/benchmarks/estimators.py). ``paper`` is the paper's protocol. ``fast`` reaches about
its final density (1.0 %) in 9 levels instead of 20, with all images and epochs. ``reduced`` and ``minimal`` reach it in a few
levels, with few epochs and images: hours on two CPU cores. ``evidence`` trains on all images for a few epochs and reaches 1.5 % in four levels: a
core takes eight to fifteen minutes for a dense resnet20; ``evidence_small`` is its like for larger networks, with fewer images. ``costs`` trains three
epochs of four steps a level with the paper's batch and ten weight samples: enough to time a step, too few to learn. ``quick`` takes minutes, ``smoke`` seconds.
"""
PRESET_HELP = (
    "default; paper: ten weight samples per batch; fast: nine larger prunings; reduced, minimal: hours on two cores; evidence, "
    "evidence_small: few epochs for many seeds; costs: twelve steps a level, to time them; quick: minutes; smoke: seconds"
)
