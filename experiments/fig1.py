"""Question: which pruning score finds tickets that train to the dense network's accuracy and calibration?

The paper's figure 1: test accuracy and MACE against weights remaining, for a Bayesian network pruned by snr, magnitude and
squared_sum, and for the deterministic network.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study

GUIDES = (
    ("mean_field", "snr"),
    ("deterministic", "magnitude"),
    ("mean_field", "magnitude"),
    ("mean_field", "squared_sum"),
)


def jobs(study: Study) -> list[Job]:
    """Four runs per network and seed."""
    return [study.imp(arch, seed, guide, score) for seed, arch in study.each() for guide, score in GUIDES]


if __name__ == "__main__":
    sys.exit(main("fig1"))
