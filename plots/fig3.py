"""One layer of a ticket and of its controls as images (paper, figure 3): ``python -m plots.fig3 RUNS -o FOLDER``."""

import sys

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.study.finished import Finished, of_guide
from plots.command import main
from plots.style import Plot, finish
from pyro_lottery import masks
from pyro_lottery.controls import randomised
from pyro_lottery.errors import UserError
from pyro_lottery.tickets import CONTROLS

COLUMNS = 72
"""Number of weights shown per filter."""


def plot(finished: Finished) -> Plot:
    """Initial locs of one layer, pruned weights white, at the level whose density is nearest to 20 %."""
    rows = of_guide(finished.own_levels)
    rows = rows[(rows["level"] > 0) & rows["arch"].isin(finished.archs)]
    if not len(rows):
        raise UserError("no pruned level of a run by snr is finished; run python -m experiments.fig3")
    row = rows.loc[(rows["density"] - 0.2).abs().idxmin()]
    run, level = next(r for r in finished.sources[row["source"]] if r.folder.path.name == row["run"]), int(row["level"])
    tickets = {"ticket": run.level(level).ticket} | {name: randomised(run, level, name) for name in CONTROLS}
    density = masks.density_per_site(tickets["ticket"].mask)
    # The layer whose density differs most from the global one, so that even and layerwise shuffles look different.
    middle = list(density)[1:-1] or list(density)
    site = max(middle, key=lambda name: abs(density[name] - row["density"]))
    pictures = {name: _picture(t.start.loc[site], t.mask[site]) for name, t in tickets.items()}
    limit = max(np.nanmax(np.abs(picture)) for picture in pictures.values() if np.isfinite(picture).any())
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        image = axes.imshow(picture, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        kept = int(tickets[name].mask[site].sum())
        axes.set_title(f"{name}\n{kept:,} of {tickets[name].mask[site].numel():,} left", fontsize=8)
        axes.set(xticks=[], yticks=[], xlabel="weights of a filter")
    figure.axes[0].set_ylabel("filter")
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="initial loc")
    what = f"{run.config.arch}, layer {site}, level {level} ({100 * row['density']:.3g} % of all weights remaining)"
    finish(figure, finished, f"A ticket and its randomised controls: {what}", "white: pruned", [1])
    return Plot(figure, _table(tickets, site))


def _picture(loc, mask):
    return np.where(mask, loc, np.nan).reshape(len(loc), -1)[:, :COLUMNS]


def _table(tickets, site):
    counts = {name: int(t.mask[site].sum()) for name, t in tickets.items()}
    same_mask = {n: bool((t.mask[site] == tickets["ticket"].mask[site]).all()) for n, t in tickets.items()}
    total = {name: masks.remaining(t.mask) for name, t in tickets.items()}
    columns = {"layer": site, "remaining_in_layer": counts, "remaining": total, "mask_is_the_tickets": same_mask}
    return pd.DataFrame(columns, index=list(tickets)).rename_axis("kind").reset_index()


if __name__ == "__main__":
    sys.exit(main("fig3"))
