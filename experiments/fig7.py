"""Question: does a lower learning rate, or a warm-up, give better tickets?

The paper's figure 7: accuracy of the tickets at several learning rates, each with and without a warm-up.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study


def jobs(study: Study) -> list[Job]:
    """Bayesian runs at every rate with and without a warm-up; deterministic runs, the paper's inset, without."""
    settings = [("mean_field", 0), ("mean_field", study.extent.warmup_epochs), ("deterministic", 0)]
    return [
        study.imp(arch, seed, guide, lr=rate, warmup_epochs=warmup)
        for seed, arch in study.each()
        for guide, warmup in settings
        for rate in study.extent.rates
    ]


if __name__ == "__main__":
    sys.exit(main("fig7"))
