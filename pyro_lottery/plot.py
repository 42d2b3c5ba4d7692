"""Plots of a run for notebooks: each function plots on the given matplotlib axes, or on new ones, and returns them.

``run`` comes from ``pl.load_run``. No function trains or writes files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_lottery import masks, metrics
from pyro_lottery.data import in_memory
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.runs import figures
from pyro_lottery.runs.figures import PALETTE
from pyro_lottery.runs.loaded import Run

QUANTITIES = {"loc": "loc", "scale": "scale", "snr": "log10 of |loc|/scale"}


def accuracy(run: Run, axes: Axes | None = None) -> Axes:
    """Plot the test accuracy in % against the % of weights remaining.

    The lines show the accuracy after the last epoch, the maximum over epochs, and the accuracy of the dense network. For a
    regression, it is the RMSE in the targets' unit.
    """
    axes = _axes(axes)
    figures.accuracy(axes, run.folder.finished())
    return axes


def calibration(run: Run, axes: Axes | None = None) -> Axes:
    """Plot MACE and ECE (paper §4) against the % of weights remaining.

    For a regression, it is the share of targets inside the central predictive intervals with 50, 80 and 95 %.
    """
    axes, rows = _axes(axes), run.folder.finished()
    if rows[0].is_regression:
        figures.coverage(axes, rows)
        return axes
    percent = [100 * row.density for row in rows]
    for look, name in enumerate(("mace", "ece")):
        axes.plot(percent, [getattr(row, name) for row in rows], "o-", color=PALETTE[look], label=name.upper())
    axes.set(ylabel="calibration error", ylim=(0, None))
    axes.legend(frameon=False)
    figures.percent_axis(axes, min(percent))
    return axes


def cost(run: Run, axes: Axes | None = None) -> Axes:
    """Plot the milliseconds of a training step and the test accuracy (or RMSE) against the % of weights remaining."""
    axes = _axes(axes)
    figures.cost(axes, run.folder.finished())
    return axes


def layers(run: Run, axes: Axes | None = None) -> Axes:
    """Plot the density of each layer in %, one line per level, from the dense level (light) to the last (black)."""
    axes = _axes(axes)
    figures.layers(axes, run.folder)
    return axes


def reliability(run: Run, level: int, probs: Tensor | None = None, axes: Axes | None = None) -> Axes:
    """Plot accuracy against confidence in the bins of MACE, with bars for the share of images in each bin.

    ``probs`` [n, classes] are predictions for the run's test images; by default they are predicted as the run did it.
    Raises ``UserError`` if the run has real targets.
    """
    if run.shape.num_classes is None:
        raise UserError(f"{run.folder.path} has real targets, but reliability needs classes; use pl.plot.calibration")
    axes, test = _axes(axes), in_memory(run.load_data().test)
    if probs is None:
        probs = run.level(level).load_model().predict(test, run.config.eval_samples, run.config.seed)
    mean, right, count = metrics.reliability(probs, test.labels)
    axes.plot([0, 1], [0, 1], color="0.7", lw=1, label="calibrated")
    axes.plot(mean.numpy(), right.numpy(), "o-", color=PALETTE[0], label=f"level {level}")
    shares, width = (count / len(probs)).numpy(), 0.8 / metrics.BINS
    axes.bar(mean.numpy(), shares, width=width, color=PALETTE[1], alpha=0.5, label="share of images")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    return axes


def histograms(
    run: Run, level: int, quantity: str = "snr", sites: Sequence[str] | None = None, bins: int = 50
) -> list[Axes]:
    """Plot a histogram of ``quantity`` (loc, scale or snr) for each prunable layer, over the weights surviving at ``level``.

    The share that the next level prunes has another colour. Raises ``UserError`` if ``quantity`` or one of ``sites`` is
    unknown, or if a deterministic run has no such quantity.
    """
    from matplotlib import pyplot as plt

    values, pruned = _values(run, level, quantity), _pruned_next(run, level)
    chosen = _known(sites or None, values)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (2.6 * columns, 2.0 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, site in zip(grid.flat, chosen, strict=False):
        gone = pruned[site] if pruned else np.zeros(len(values[site]), dtype=bool)
        edges = np.histogram_bin_edges(values[site], bins)
        axes.hist(values[site], edges, color=PALETTE[0])
        axes.hist(values[site][gone], edges, color=PALETTE[1])
        axes.set_title(f"{site}\n{100 * gone.mean() if len(gone) else 0:.0f} % pruned next", fontsize=7)
        axes.set_yticks([])
    for axes in list(grid.flat)[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel(QUANTITIES[quantity], fontsize=9)
    return list(grid.flat)[: len(chosen)]


def ridge(run: Run, quantity: str = "snr", axes: Axes | None = None, bins: int = 80) -> Axes:
    """Plot the distribution of ``quantity`` (loc, scale or snr) over all surviving weights, one ridge per level.

    Raises ``UserError`` if ``quantity`` is unknown, or if a deterministic run has no such quantity.
    """
    axes = _axes(axes)
    levels = [row.level for row in run.folder.finished()]
    every = {level: np.concatenate(list(_values(run, level, quantity).values())) for level in levels}
    edges = np.histogram_bin_edges(np.concatenate(list(every.values())), bins)
    for level, values in every.items():
        height, _ = np.histogram(values, edges, density=True)
        base = -float(level)
        centres = (edges[:-1] + edges[1:]) / 2
        shape = base + 1.6 * height / max(height.max(), 1e-12)
        axes.fill_between(centres, base, shape, color=PALETTE[level % len(PALETTE)], alpha=0.6, lw=0)
        axes.plot(centres, shape, color="0.2", lw=0.6)
    density = {row.level: 100 * row.density for row in run.folder.finished()}
    axes.set_yticks([-level for level in levels], [f"{level} ({density[level]:.3g} %)" for level in levels])
    axes.set(xlabel=QUANTITIES[quantity], ylabel="level (weights remaining)")
    return axes


def mask(run: Run, level: int, site: str, axes: Axes | None = None) -> Axes:
    """Plot the mask of the layer ``site`` at ``level`` as an image with one row per filter, black for surviving weights.

    Raises ``UserError`` if ``site`` is not a prunable layer.
    """
    axes, found = _axes(axes), run.level(level).mask
    (site,) = _known([site], found)
    axes.imshow(found[site].flatten(1).numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    remaining = 100 * masks.density_per_site(found)[site]
    axes.set(xlabel="weights of a filter", ylabel="filter", title=f"{site}, level {level}: {remaining:.3g} % remaining")
    return axes


def weight(run: Run, level: int, site: str, index: Sequence[int] | int, axes: Axes | None = None) -> Axes:
    """Plot the posterior density and the prior density of one weight; ``index`` is its index in the site's tensor.

    Raises ``UserError`` if there is no such weight, if it is pruned, or if the run is deterministic.
    """
    axes, network = _axes(axes), run.level(level).load_model()
    posterior = run.level(level).posterior
    (site,) = _known([site], posterior.loc)
    # int() also converts NumPy's integers.
    place = tuple(int(i) for i in (index if isinstance(index, Iterable) else (index,)))
    if posterior.scale is None:
        raise UserError("a deterministic run has no posterior density to plot; use a Bayesian run")
    try:
        loc, scale = float(posterior.loc[site][place]), float(posterior.scale[site][place])
    except (IndexError, RuntimeError, ValueError) as error:
        shape = tuple(posterior.loc[site].shape)
        raise UserError(f"{site} has no weight at {place}; its shape is {shape}") from error
    if scale == 0:
        raise UserError(
            f"weight {place} of {site} is pruned at level {level}, so it is exactly 0; choose a surviving weight"
        )
    wide = torch.linspace(loc - 6 * scale, loc + 6 * scale, 400)
    own = torch.distributions.Normal(loc, scale).log_prob(wide)
    label = "posterior" + (" (Normal of its loc and scale)" if posterior.draws else "")
    axes.plot(wide.numpy(), own.exp().numpy(), color=PALETTE[0], label=label)
    prior = network.model.prior_of(site)
    if prior.batch_shape:  # each weight has its own prior
        prior = prior.expand(posterior.loc[site].shape)
        density = torch.stack([prior.log_prob(value)[place] for value in wide])
    else:
        density = prior.log_prob(wide)
    axes.plot(wide.numpy(), density.exp().numpy(), color=PALETTE[1], label="prior")
    axes.set(xlabel=f"{site}{list(place)}", ylabel="density", yscale="log")
    axes.legend(frameon=False)
    return axes


def _axes(axes: Axes | None) -> Any:
    if axes is not None:
        return axes
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _known(sites: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    for site in sites or ():
        if site not in known:
            raise unknown("site", site, known)
    return list(sites) if sites is not None else known


def _values(run: Run, level: int, quantity: str) -> dict[str, np.ndarray]:
    """The values of ``quantity`` for the surviving weights of each prunable layer."""
    if quantity not in QUANTITIES:
        raise unknown("quantity", quantity, QUANTITIES)
    posterior, mask = run.level(level).posterior, run.level(level).mask
    if quantity != "loc" and posterior.scale is None:
        raise UserError(f"a deterministic run has no {quantity}; plot loc")
    found = {}
    for site, alive in mask.items():
        loc = posterior.loc[site][alive]
        if quantity == "loc":
            found[site] = loc.numpy()
            continue
        scale = posterior.scale[site][alive]  # type: ignore[index]
        found[site] = (scale if quantity == "scale" else (loc.abs() / scale).clamp_min(1e-12).log10()).numpy()
    return found


def _pruned_next(run: Run, level: int) -> dict[str, np.ndarray] | None:
    if run.folder.origin or level + 1 not in {row.level for row in run.folder.finished()}:
        return None
    now, later = run.level(level).mask, run.level(level + 1).mask
    return {site: (~later[site][alive]).numpy() for site, alive in now.items()}
