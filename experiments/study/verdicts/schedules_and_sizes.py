"""Claims 12 to 14: learning-rate rewinding, larger networks, and the learning rate."""

from __future__ import annotations

import pandas as pd

from experiments.study.finished import GUIDES, of_guide
from experiments.study.protocols import LARGER
from experiments.study.statistics import Curve, Part, above, below, judged
from experiments.study.verdicts.evidence import CLOSE, SMALL, Evidence


def claim_12(e: Evidence) -> list[Part]:
    """LRR beats IMP for ResNet (both) and deterministic VGG; for Bayesian VGG and ViT only at high sparsity.

    Mean over levels of accuracy(LRR) − accuracy(IMP), above 0; for Bayesian VGG and ViT above 0 at density ≤ 10 % and
    not (below 1 point) at higher density.
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
                parts.append(above(f"{what} high sparsity", lrr.ahead_of(imp, "accuracy", 0, 0.1), runs, margin=CLOSE))
                parts.append(below(f"{what} medium sparsity", lrr.ahead_of(imp, "accuracy", 0.1), runs, CLOSE))
    return parts


def claim_13(e: Evidence) -> list[Part]:
    """Larger networks score higher with the same shape; VGG19 shows no drop.

    Mean over levels of accuracy(large) − accuracy(small), above 0; correlation of the two curves over levels, above 0;
    accuracy of vgg19 at the sparsest level minus dense, above −1 point. Score snr.
    """
    parts = []
    for family in SMALL:
        for small in (arch for arch in e.networks(family) if arch in LARGER):
            a, b = e.curve(small), e.curve(LARGER[small])
            runs, pair = [*a.runs, *b.runs], f"{LARGER[small]}, {small}"
            parts.append(above(f"{pair}: accuracy, large − small", b.ahead_of(a, "accuracy"), runs, margin=CLOSE))
            shape = _correlation(a, b)
            parts.append(above(f"{pair}: correlation of the curves", shape, runs))
            if LARGER[small] == "vgg19":
                drop = b.sparsest("accuracy") - b.dense("accuracy")
                parts.append(above("vgg19: sparsest − dense", drop, b.runs, -CLOSE))
    return parts


def _correlation(a: Curve, b: Curve) -> pd.Series:
    """Per seed the correlation of accuracy over the levels of both curves, of which there must be three."""
    one, other = a.by_level("accuracy"), b.by_level("accuracy")
    common = [level for level in one.columns if level in other.columns]
    return one[common].corrwith(other[common], axis=1) if len(common) >= 3 else pd.Series(dtype=float)


def claim_14(e: Evidence) -> list[Part]:
    """A low learning rate gives matching tickets at a lower ceiling; warm-up equals the high rate at medium sparsity; a high rate is best at high sparsity.

    Low and high are the least and the greatest rate of a network's runs by snr. Mean over levels of density 10 to 50 % of accuracy(low) minus its dense one, above
    −1 point; mean over levels of density ≥ 10 % of accuracy(low) minus that of the protocol's own rate, below 0; accuracy(high,
    warm-up) − accuracy(high) at density 10 to 50 %, within ±1; accuracy(high) minus each other rate's at density ≤ 5 %, above 0.
    """
    return [part for arch in e.all_networks() for part in _rates(e, arch)]


def _rates(e: Evidence, arch: str) -> list[Part]:
    rows = of_guide(e.levels, arch=arch)
    plain, warm = rows[rows["warmup_epochs"] == 0], rows[rows["warmup_epochs"] > 0]
    seeds = plain.groupby("lr")["seed"].nunique()
    rates = sorted(seeds.index[seeds == seeds.max()])  # a rate that not all seeds have is not the study's
    curves = {rate: Curve(plain[plain["lr"] == rate]) for rate in rates}
    base, none, runs = e.curve(arch), pd.Series(dtype=float), list(rows["run"].unique())
    low, high = (curves[min(curves)], curves[max(curves)]) if len(curves) > 1 else (Curve(plain[:0]), Curve(plain[:0]))
    lowest_is_base = bool(set(low.runs) & set(base.runs))
    ceiling = none if lowest_is_base else low.ahead_of(base, "accuracy", 0.1)
    warmed = Curve(warm[warm["lr"].isin(high.frame["lr"])]).ahead_of(high, "accuracy", 0.1, 0.5)
    others = {
        rate: high.ahead_of(c, "accuracy", 0, 0.05) for rate, c in curves.items() if c is not high and len(curves) > 1
    }
    return [
        above(f"{arch}: low rate, sparse − dense", low.at("accuracy", 0.1, 0.5) - low.dense("accuracy"), runs, -CLOSE),
        below(f"{arch}: low rate − the usual rate", ceiling, runs, margin=CLOSE),
        judged(f"{arch}: high rate, warm-up − none", -CLOSE, CLOSE, warmed, runs),
        *(
            above(f"{arch}: high rate − {rate} at high sparsity", ahead, runs, margin=CLOSE)
            for rate, ahead in (others or {"others": none}).items()
        ),
    ]
