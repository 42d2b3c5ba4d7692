"""Question: is it better to keep the trained values and restart the learning rate alone (LRR) than to rewind (IMP)?

The paper's figure 8: accuracy of both, Bayesian and deterministic.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study


def jobs(study: Study) -> list[Job]:
    """Figure 2's runs, rewound to the initial values and in the learning rate alone."""
    return [
        study.imp(arch, seed, guide, rewind=rewind)
        for seed, arch in study.each()
        for guide in ("mean_field", "deterministic")
        for rewind in ("init", "lr")
    ]


if __name__ == "__main__":
    sys.exit(main("fig8"))
