"""Question: do larger networks of a family score higher, with the same shape of the curve?

The paper's figure 6 (appendix A): accuracy of the tickets of a small and of a large network, by the score snr.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study
from experiments.study.protocols import LARGER


def jobs(study: Study) -> list[Job]:
    """The run pruned by snr, and that of the larger network of its family."""
    return [study.imp(a, seed) for seed, arch in study.each() for a in (arch, LARGER.get(arch)) if a]


if __name__ == "__main__":
    sys.exit(main("fig6"))
