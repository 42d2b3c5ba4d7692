"""Claims 6 to 8: which layers are pruned, and what the randomised controls lose."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from experiments.study.finished import GUIDES
from experiments.study.statistics import ERROR, Part, above, at_every_level, judged, rank_correlation
from experiments.study.verdicts.evidence import CLOSE, SMALL, Evidence
from pyro_lottery.tickets import CONTROLS


def claim_6(e: Evidence) -> list[Part]:
    """Deeper layers are pruned more, and more so in Bayesian than in deterministic networks.

    ρ = Spearman's rank correlation of depth and sparsity over the layers of the last level, without shortcuts; ρ above
    0 for both, and ρ(Bayesian, snr) − ρ(deterministic) above 0.
    """
    parts = []
    for arch in e.all_networks():
        rho, runs = {}, {}
        for guide, name in GUIDES.items():
            curve = e.curve(arch, guide)
            rho[name], runs[name] = rank_correlation(e.layers[e.layers["run"].isin(curve.runs)]), curve.runs
            parts.append(above(f"{arch}: ρ of depth and sparsity, {name}", rho[name], curve.runs))
        both = [*runs["Bayesian"], *runs["deterministic"]]
        parts.append(above(f"{arch}: ρ, Bayesian − deterministic", rho["Bayesian"] - rho["deterministic"], both))
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

    Mean over levels of accuracy(ticket) − accuracy(control): above 1 point where the advantage is lost, within ±1 where
    a control stays close; accuracy(reinit) − accuracy(shuffle_layerwise) above 0. Bayesian networks.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            ticket, controls = e.curve(arch), {c: e.curve(arch, treatment=c) for c in CONTROLS}
            for control, c in controls.items():
                close = family != "vit" and control in ("reinit", "shuffle_layerwise")
                low, high = (-CLOSE, CLOSE) if close else (CLOSE, math.inf)
                gap = ticket.ahead_of(c, "accuracy")
                parts.append(judged(f"{arch}: ticket − {control}", low, high, gap, [*ticket.runs, *c.runs]))
            if family != "vit":
                reinit, layerwise = controls["reinit"], controls["shuffle_layerwise"]
                ahead = reinit.ahead_of(layerwise, "accuracy")
                parts.append(
                    above(f"{arch}: reinit − shuffle_layerwise", ahead, [*reinit.runs, *layerwise.runs], margin=CLOSE)
                )
    return parts
