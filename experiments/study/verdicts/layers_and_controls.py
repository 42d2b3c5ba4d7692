"""Claims 6 to 8: which layers are pruned, and what the randomised controls lose."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from experiments.study.finished import GUIDES
from experiments.study.statistics import ERROR, Part, above, at_every_level, depth_slope
from experiments.study.verdicts.evidence import CLOSE, SMALL, Evidence
from pyro_lottery.tickets import CONTROLS


def claim_6(e: Evidence) -> list[Part]:
    """Deeper layers are pruned more, and more so in Bayesian than in deterministic networks.

    Rise = the points of sparsity from the first layer to the last of the sparsest level, by a line over the layers without shortcuts; above
    0 for both, and rise(Bayesian, snr) − rise(deterministic) above 0.
    """
    parts = []
    for arch in e.all_networks():
        rise, runs = {}, {}
        for guide, name in GUIDES.items():
            curve = e.curve(arch, guide)
            rise[name], runs[name] = depth_slope(e.layers[e.layers["run"].isin(curve.runs)]), curve.runs
            parts.append(above(f"{arch}: rise of sparsity with depth, {name}", rise[name], curve.runs))
        both = [*runs["Bayesian"], *runs["deterministic"]]
        parts.append(above(f"{arch}: rise, Bayesian − deterministic", rise["Bayesian"] - rise["deterministic"], both))
    return parts


def claim_7(e: Evidence) -> list[Part]:
    """The IMP ticket is the ceiling of all randomised controls.

    accuracy(ticket) − accuracy(control): its mean over levels above 0, and no level below −1 point, for every control, Bayesian and
    deterministic. It fails if the mean is below 0 or a level below −1 point, corrected over the levels.
    """
    parts = []
    for arch in e.all_networks():
        for guide, name in GUIDES.items():
            for control in CONTROLS:
                ticket, randomised = e.curve(arch, guide), e.curve(arch, guide, treatment=control)
                runs, what = [*ticket.runs, *randomised.runs], f"{arch}, {name}: ticket − {control}"
                parts.append(_ceiling(what, ticket.gaps(randomised, "accuracy"), runs))
    return parts


def _ceiling(what: str, gaps: pd.DataFrame, runs: list[str]) -> Part:
    """Shows the values of the mean, or those of the worst level if that alone makes it fail."""
    mean = above(what, gaps.mean(axis=1, skipna=False), runs, margin=CLOSE)
    levels = at_every_level(what, -CLOSE, math.inf, gaps, runs)
    close = at_every_level(what, -CLOSE, CLOSE, gaps, runs)
    tests = 1 + levels.tests
    of_levels = tests * levels.p_fails / levels.tests
    shown = levels if of_levels <= min(ERROR, tests * mean.p_fails) else mean
    return replace(
        shown, wanted=f"> 0 on average, {levels.wanted}", p_holds=max(mean.p_holds, levels.p_holds),
        p_fails=min(1.0, tests * mean.p_fails, of_levels), p_equivalent=max(mean.p_equivalent, close.p_holds), margin=CLOSE, tests=tests,
        p_flips=None if mean.p_flips is None or levels.p_flips is None else max(mean.p_flips, levels.p_flips),
    )  # fmt: skip


def claim_8(e: Evidence) -> list[Part]:
    """Even and global shuffling lose the advantage; for ResNet and VGG reinit and layerwise shuffling stay close, reinit above layerwise; for ViT all controls drop.

    accuracy(ticket) − accuracy(control): above 1 point on average where the advantage is lost, within ±1 at every level where
    a control stays close; accuracy(reinit) − accuracy(shuffle_layerwise) above 0 on average. Bayesian networks.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            ticket, controls = e.curve(arch), {c: e.curve(arch, treatment=c) for c in CONTROLS}
            for control, c in controls.items():
                what, gaps, runs = f"{arch}: ticket − {control}", ticket.gaps(c, "accuracy"), [*ticket.runs, *c.runs]
                if family != "vit" and control in ("reinit", "shuffle_layerwise"):
                    parts.append(at_every_level(what, -CLOSE, CLOSE, gaps, runs))
                else:
                    parts.append(above(what, gaps.mean(axis=1, skipna=False), runs, CLOSE))
            if family != "vit":
                reinit, layerwise = controls["reinit"], controls["shuffle_layerwise"]
                ahead = reinit.ahead_of(layerwise, "accuracy")
                parts.append(
                    above(f"{arch}: reinit − shuffle_layerwise", ahead, [*reinit.runs, *layerwise.runs], margin=CLOSE)
                )
    return parts
