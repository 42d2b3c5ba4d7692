"""Question: does the squared sum collapse in the paper's figure 1 because of its formula or of its implementation?

Compares the paper's formulas with those of a public research fork that appears to hold the paper's code:
snr |μ|/σ against mean_over_variance |μ|/(σ²+1e-6), squared_sum √(μ²+σ²) against squared_sum_log_scale μ²+(log σ)².
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study

SCORES = ("snr", "mean_over_variance", "squared_sum", "squared_sum_log_scale")


def jobs(study: Study) -> list[Job]:
    """One run per formula, network and seed."""
    return [study.imp(arch, seed, score=score) for seed, arch in study.each() for score in SCORES]


if __name__ == "__main__":
    sys.exit(main("squared_sum"))
