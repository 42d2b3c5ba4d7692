"""Claims 12 to 14: learning-rate rewinding, larger networks, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from experiments.study.finished import GUIDES, of_guide
from experiments.study.protocols import LARGER, PROTOCOLS
from experiments.study.statistics import ERROR, ROUNDED, Curve, Part, above, below, judged, shared
from experiments.study.verdicts.evidence import CLOSE, MATCHING, SMALL, Evidence

ABOVE_10 = 0.1 * (1 + 3 * ROUNDED)
"""Above a density of 10 %, which masks of whole weights do not hit exactly."""


def claim_12(e: Evidence) -> list[Part]:
    """LRR beats IMP for ResNet (both) and deterministic VGG; for Bayesian VGG and ViT only at high sparsity.

    Mean over levels of accuracy(LRR) − accuracy(IMP), above 0; for Bayesian VGG and ViT above 0 at density ≤ 10 %, not at higher density (below 1
    point, and not shown to be above 0), and less there.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            for guide, name in GUIDES.items():
                if family == "vit" and guide == "deterministic":  # of which the paper says nothing
                    continue
                lrr, imp = e.curve(arch, guide, rewind="lr"), e.curve(arch, guide)
                runs = [*lrr.runs, *imp.runs]
                if family == "resnet" or guide == "deterministic":
                    parts.append(above(f"{arch}, {name}: LRR − IMP", lrr.ahead_of(imp, "accuracy"), runs, margin=CLOSE))
                    continue
                what = f"{arch}, {name}: LRR − IMP at"
                high, medium = lrr.ahead_of(imp, "accuracy", 0, 0.1), lrr.ahead_of(imp, "accuracy", ABOVE_10)
                parts.append(above(f"{what} high sparsity", high, runs, margin=CLOSE))
                parts.append(_not_ahead(f"{what} medium sparsity", medium, runs))
                parts.append(above(f"{what} high − medium sparsity", high - medium, runs, margin=CLOSE))
    return parts


def _not_ahead(what: str, gap: pd.Series, runs: list[str]) -> Part:
    """Holds if the mean is below 1 point, unless it is shown to be above 0, and then it fails."""
    close, ahead = below(what, gap, runs, CLOSE), above(what, gap, runs)
    p_holds = close.p_holds if ahead.p_holds > ERROR else 1.0
    return replace(close, wanted=f"{close.wanted}, not above 0", p_holds=p_holds, p_fails=ahead.p_holds)


def claim_13(e: Evidence) -> list[Part]:
    """Larger networks score higher with the same shape; VGG19 shows no drop.

    Mean over levels of accuracy(large) − accuracy(small), above 0; correlation of the two curves over levels, above 0;
    accuracy of vgg19 at the sparsest level minus dense, above −1 point. Score snr.
    """
    parts = []
    for family in SMALL:
        for small in e.networks(family):
            larger = LARGER.get(small, "a larger network")
            a, b = e.curve(small), e.curve(larger)
            runs, pair = [*a.runs, *b.runs], f"{larger}, {small}"
            parts.append(above(f"{pair}: accuracy, large − small", b.ahead_of(a, "accuracy"), runs, margin=CLOSE))
            shape = _correlation(a, b)
            parts.append(above(f"{pair}: correlation of the curves", shape, runs))
            if larger == "vgg19":
                drop = b.sparsest("accuracy") - b.dense("accuracy")
                parts.append(above("vgg19: sparsest − dense", drop, b.runs, -CLOSE))
    return parts


def _correlation(a: Curve, b: Curve) -> pd.Series:
    """Per seed the correlation of accuracy over the levels of both curves, of which there must be five: of fewer it is far from normal."""
    one, other = (curve.by_level("accuracy") for curve in shared(a, b))
    return one.corrwith(other, axis=1) if one.shape[1] >= 5 else pd.Series(dtype=float)


def claim_14(e: Evidence) -> list[Part]:
    """A low learning rate gives matching tickets at a lower ceiling; warm-up equals the high rate at medium sparsity; a high rate is best at high sparsity.

    Low and high are the least and the greatest rate of the protocol; without one, those of a network's runs by snr. Mean over levels of density 10 to 50 % of
    accuracy(low) minus its dense one, above −0.5 points; mean over levels of density ≥ 10 % of accuracy(low) minus that of the protocol's own rate, below 0; accuracy(high,
    warm-up) − accuracy(high) at density 10 to 50 %, within ±1; accuracy(high) minus each other rate's at density ≤ 5 %, above 0.
    """
    return [part for arch in e.all_networks() for part in _rates(e, arch)]


def _rates(e: Evidence, arch: str) -> list[Part]:
    rows = of_guide(e.levels, arch=arch)
    plain, warm = rows[rows["warmup_epochs"] == 0], rows[rows["warmup_epochs"] > 0]
    base, runs = e.curve(arch), list(rows["run"].unique())
    wanted = {rate for name in rows["protocol"].unique() if name in PROTOCOLS for rate in PROTOCOLS[name].rates}
    rates = sorted(wanted | set(base.frame["lr"]) if wanted else set(plain["lr"]))
    if len(rates) < 2:
        rates = [math.nan, math.nan]  # of which there are no runs
    low, *_, high = rates
    name = {rate: "" if math.isnan(rate) else f" {rate:g}" for rate in rates}
    curves = {rate: Curve(plain[plain["lr"] == rate]) for rate in rates}
    gain = curves[low].at("accuracy", 0.1, 0.5) - curves[low].dense("accuracy")
    ceiling = curves[low].ahead_of(base if low not in set(base.frame["lr"]) else Curve(plain[:0]), "accuracy", 0.1)
    warmed = Curve(warm[warm["lr"] == high]).ahead_of(curves[high], "accuracy", 0.1, 0.5)
    return [
        above(f"{arch}: low rate{name[low]}, sparse − dense", gain, runs, -MATCHING),
        below(f"{arch}: low rate{name[low]} − the usual rate", ceiling, runs, margin=CLOSE),
        judged(f"{arch}: high rate{name[high]}, warm-up − none", -CLOSE, CLOSE, warmed, runs),
        *(
            above(f"{arch}: high rate{name[high]} −{name[rate] or ' others'} at high sparsity", curves[high].ahead_of(curves[rate], "accuracy", 0, 0.05), runs, margin=CLOSE)
            for rate in rates[:-1]
        ),
    ]  # fmt: skip
