"""Accuracy of the tickets of small and large networks (paper, figure 6): ``python -m plots.fig6 RUNS -o FOLDER``."""

import sys

from experiments.study.finished import Finished, of_guide
from experiments.study.protocols import LARGER
from plots.command import main
from plots.style import Line, Plot, accuracies, grid
from pyro_lottery.errors import UserError


def plot(finished: Finished) -> Plot:
    """One panel per family whose two networks both have runs."""
    levels = of_guide(finished.levels)
    found = set(levels["arch"])
    families = {small: large for small, large in LARGER.items() if {small, large} <= found}
    if not families:
        pairs = ", ".join(f"{a} and {b}" for a, b in LARGER.items())
        raise UserError(f"no family has both of its networks finished ({pairs}); run python -m experiments.fig6")
    columns = {f"{a}, {b}": levels[levels["arch"].isin([a, b])] for a, b in families.items()}
    panels = accuracies(finished, _small_and_large)
    return grid(finished, "Tickets of small and large networks (Bayesian, snr)", [panels], columns)


def _small_and_large(frame):
    (pair,) = (pair for pair in LARGER.items() if set(pair) == set(frame["arch"]))
    return [Line(arch, frame[frame["arch"] == arch], look) for look, arch in enumerate(pair)]


if __name__ == "__main__":
    sys.exit(main("fig6"))
