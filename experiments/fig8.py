"""Question: is it better to keep the trained values and restart only the learning rate (LRR), or to rewind the values (IMP)?

The paper's figure 8: accuracy of both, Bayesian and deterministic.
"""

import sys

from experiments.command import main
from experiments.study.finished import GUIDES
from experiments.study.jobs import Job, Study


def jobs(study: Study) -> list[Job]:
    """Figure 2's runs, with both kinds of rewinding."""
    return [
        study.imp(arch, seed, guide, rewind=rewind)
        for seed, arch in study.each()
        for guide in GUIDES
        for rewind in ("init", "lr")
    ]


if __name__ == "__main__":
    sys.exit(main("fig8"))
