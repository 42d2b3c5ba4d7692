"""Question: are larger networks of a family more accurate, with the same shape of the curve?

The paper's figure 6 (appendix A): accuracy of the tickets of a small and a large network, pruned by snr.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study
from experiments.study.protocols import LARGER


def jobs(study: Study) -> list[Job]:
    """The runs of each network and of the larger one of its family, pruned by snr."""
    return [study.imp(a, seed) for seed, arch in study.each() for a in (arch, LARGER.get(arch)) if a]


if __name__ == "__main__":
    sys.exit(main("fig6"))
