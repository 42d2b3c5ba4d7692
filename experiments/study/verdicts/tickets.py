"""Claims 1 to 5: winning tickets, the pruning scores, and calibration."""

from __future__ import annotations

import itertools
import math

from experiments.study.statistics import (
    ERROR,
    Curve,
    Part,
    above,
    at_every_level,
    below,
    flips,
    p_above,
    p_below,
    shared,
)
from experiments.study.verdicts.evidence import CALIBRATED, CLOSE, MATCHING, SCORES, SMALL, Evidence


def claim_1(e: Evidence) -> list[Part]:
    """Winning tickets exist in BNNs: some level of at least 50 % sparsity matches the dense BNN.

    d = accuracy(level) − accuracy(dense) per seed; a level matches if mean(d) is above −0.5 points. Levels are tested from the densest of at most 50 % on, and
    the first that does not match ends the tests, so that they need no correction; the sparsest that matches is reported. Fails if d is below −0.5 at each.
    """
    return [_winning(arch, e.curve(arch)) for arch in e.all_networks()]


def _winning(arch: str, curve: Curve) -> Part:
    gaps, wanted, runs = curve.from_dense("accuracy"), f"> {-MATCHING:g}", tuple(curve.runs)
    density = curve.frame.groupby("level")["density"].mean()
    found = {level: gaps[level].dropna().tolist() for level in gaps.columns if density[level] <= 0.5}
    if not found:
        return Part(f"{arch}: accuracy − dense", wanted, (), runs)
    p_holds, first = {level: p_above(d, -MATCHING) for level, d in found.items()}, next(iter(found))
    matching = list(itertools.takewhile(lambda level: p_holds[level] <= ERROR, found))
    level = matching[-1] if matching else first
    what = f"{arch}: accuracy − dense at {100 * density[level]:.3g} % remaining"
    p_fails = max(p_below(d, -MATCHING) for d in found.values())
    p_flips = flips(found[first], -MATCHING, math.inf)
    return Part(what, wanted, tuple(found[level]), runs, p_holds[first], p_fails, p_flips=p_flips)


def claim_2(e: Evidence) -> list[Part]:
    """ResNet: above 98 % sparsity squared_sum and the deterministic baseline fall faster than snr and magnitude.

    fall = accuracy(dense) − mean accuracy at density ≤ 2 %, over the levels that both have; the fall of each of the two minus that of each of the
    others is above 0. That accuracy "falls gradually" has no threshold in the paper and is left to figure 1.
    """
    parts = []
    for arch in e.networks("resnet"):
        curves = {score: e.curve(arch, score=score) for score in SCORES}
        curves["deterministic"] = e.curve(arch, "deterministic")
        for fast, slow in itertools.product(("squared_sum", "deterministic"), ("snr", "magnitude")):
            one, other = (c.dense("accuracy") - c.at("accuracy", 0, 0.02) for c in shared(curves[fast], curves[slow]))
            runs = [*curves[fast].runs, *curves[slow].runs]
            parts.append(above(f"{arch}: fall of {fast} − fall of {slow}", one - other, runs, margin=CLOSE))
    return parts


def claim_3(e: Evidence) -> list[Part]:
    """VGG11: up to 90 % sparsity every score stays within 1 point of dense, and the scores do not differ.

    At every level of density ≥ 10 %, accuracy − accuracy(dense) of every score is within ±1, and so is the difference of every two
    scores. That one is outside is corrected over the levels.
    """
    parts = []
    for arch in e.networks("vgg"):
        curves = {score: e.curve(arch, score=score).up_to(0.1) for score in SCORES}
        for score, c in curves.items():
            parts.append(at_every_level(f"{arch}: {score} − dense", -CLOSE, CLOSE, c.from_dense("accuracy"), c.runs))
        for a, b in itertools.combinations(SCORES, 2):
            gaps, runs = curves[a].gaps(curves[b], "accuracy"), [*curves[a].runs, *curves[b].runs]
            parts.append(at_every_level(f"{arch}: {a} − {b}", -CLOSE, CLOSE, gaps, runs))
    return parts


def claim_4(e: Evidence) -> list[Part]:
    """ViT: Bayesian above deterministic; snr and magnitude rise to about 50 % sparsity and fall past 90 %; squared_sum falls steadily.

    Mean over levels of accuracy(snr) − accuracy(deterministic) above 0; accuracy at density 35 to 65 % minus dense
    above 0 and accuracy at density ≤ 10 % minus that at 35 to 65 % below 0 (snr, magnitude); every level's minus that of the level before below 0
    (squared_sum).
    """
    parts = []
    for arch in e.networks("vit"):
        snr, deterministic = e.curve(arch), e.curve(arch, "deterministic")
        ahead = snr.ahead_of(deterministic, "accuracy")
        parts.append(above(f"{arch}: Bayesian − deterministic", ahead, [*snr.runs, *deterministic.runs], margin=CLOSE))
        for score in ("snr", "magnitude"):
            c = e.curve(arch, score=score)
            middle = c.at("accuracy", 0.35, 0.65)
            parts.append(above(f"{arch}: {score} at half − dense", middle - c.dense("accuracy"), c.runs, margin=CLOSE))
            parts.append(
                below(f"{arch}: {score} past 90 % − at half", c.at("accuracy", 0, 0.1) - middle, c.runs, margin=CLOSE)
            )
        c = e.curve(arch, score="squared_sum")
        what = f"{arch}: squared_sum − squared_sum one level before"
        parts.append(at_every_level(what, -math.inf, 0.0, c.steps("accuracy"), c.runs))
    return parts


def claim_5(e: Evidence) -> list[Part]:
    """MACE falls at high sparsity for ResNet and ViT and stays constant for VGG.

    MACE at density ≤ 5 % minus MACE(dense), score snr: below 0 on average, and for VGG within ±0.01 at every level.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            c = e.curve(arch)
            what = f"{arch}: MACE at high sparsity − dense"
            if family == "vgg":
                changes = c.down_to(0.05).from_dense("mace")
                parts.append(at_every_level(what, -CALIBRATED, CALIBRATED, changes, c.runs))
            else:
                change = c.at("mace", 0, 0.05) - c.dense("mace")
                parts.append(below(what, change, c.runs, margin=CALIBRATED))
    return parts
