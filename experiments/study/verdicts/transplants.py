"""Claims 9 to 11: what transplanted tickets reach, and what they save."""

from __future__ import annotations

from dataclasses import replace

from experiments.study.finished import GUIDES
from experiments.study.statistics import Part, above, below, judged, shared
from experiments.study.verdicts.evidence import CALIBRATED, CLOSE, PAPER_SAMPLES, SMALL, Evidence


def claim_9(e: Evidence) -> list[Part]:
    """Transplanted tickets reach Bayesian and deterministic tickets for ResNet and VGG, and fall short of the deterministic for ViT.

    Mean over levels of accuracy(transplanted) − accuracy(other): above −1 point; for ViT against deterministic below 0.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            moved = e.curve(arch, treatment="transplant")
            for guide, name in GUIDES.items():
                if family == "vit" and guide == "mean_field":
                    continue
                other = e.curve(arch, guide)
                ahead, runs = moved.ahead_of(other, "accuracy"), [*moved.runs, *other.runs]
                what = f"{arch}: transplanted − {name}"
                parts.append(
                    below(what, ahead, runs, margin=CLOSE) if family == "vit" else above(what, ahead, runs, -CLOSE)
                )
    return parts


def claim_10(e: Evidence) -> list[Part]:
    """Transplanted tickets are calibrated like fully Bayesian ones.

    Mean over levels of MACE(transplanted) − MACE(Bayesian, snr), within ±0.01.
    """
    parts = []
    for arch in e.all_networks():
        moved, bayesian = e.curve(arch, treatment="transplant"), e.curve(arch)
        gap = moved.ahead_of(bayesian, "mace")
        what = f"{arch}: MACE, transplanted − Bayesian"
        parts.append(judged(what, -CALIBRATED, CALIBRATED, gap, [*moved.runs, *bayesian.runs]))
    return parts


def claim_11(e: Evidence) -> list[Part]:
    """VI training costs 3 to 7 times deterministic training; transplantation saves at least half of the compute at high sparsity.

    Ratio of the mean training seconds per level, within 3 to 7; and at the sparsest level k that all transplants have the saving
    1 − (Σ_{i<k} det_i + transplant_k) / Σ_{i≤k} VI_i, above 0.5. Both are costs of the paper's ten weight samples a batch,
    and judged with these alone; the protocol ``costs`` has nothing else.
    """
    parts = []
    for arch in e.all_networks():
        vi, deterministic, moved = e.curve(arch), e.curve(arch, "deterministic"), e.curve(arch, treatment="transplant")
        whole = [c.by_level("train_seconds") for c in shared(vi, deterministic)]
        runs = [*vi.runs, *deterministic.runs]
        samples = sorted(vi.frame["train_samples"].unique()) or [PAPER_SAMPLES]
        what = f"{arch}: seconds, Bayesian / deterministic, weight samples: {' '.join(map(str, samples))}"
        costs = [judged(what, 3, 7, whole[0].mean(axis=1) / whole[1].mean(axis=1), runs)]
        last = moved.sparsest("train_seconds")
        k = int(shared(moved)[0].frame["level"].max()) if len(last) else 0
        needed = [frame.reindex(index=last.index, columns=range(k + 1)) for frame in whole]
        saving = 1 - (needed[1].loc[:, : k - 1].sum(axis=1, skipna=False) + last) / needed[0].sum(axis=1, skipna=False)
        costs.append(above(f"{arch}: compute saved by transplantation", saving, [*runs, *moved.runs], 0.5))
        if samples != [PAPER_SAMPLES]:
            why_not = f"needs {PAPER_SAMPLES} weight samples a batch"
            costs = [replace(part, p_holds=1.0, p_fails=1.0, why_not=why_not) for part in costs]
        parts += costs
    return parts
