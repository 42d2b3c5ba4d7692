"""Question: which of the paper's 14 claims hold here? ``python -m experiments.claims RUNS``.

Each claim is a list of statistics, one number per seed, with a 95 % interval over seeds (Student's t) and a verdict: holds
where the whole interval is on the claimed side, fails where it is on the other, not enough evidence otherwise, and with
fewer than three seeds always. A claim holds if all its parts do and fails if one does. Complete runs alone count. Prints
the table and writes ``claims.md`` and ``claims.json``. Accuracies are in percent, at the end of training unless
``--accuracy`` says otherwise.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from experiments.study.finished import ACCURACIES, read, treated
from experiments.study.protocols import LARGER, protocol_of
from experiments.study.statistics import (
    FAILS,
    HOLDS,
    MIN_SEEDS,
    UNKNOWN,
    Curve,
    Part,
    above,
    below,
    judged,
    rank_correlation,
    standard_error,
    together,
)
from pyro_lottery import files, tables
from pyro_lottery.errors import UserError
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.tickets import CONTROLS

SMALL = {"resnet": ("resnet18", "resnet20"), "vgg": ("vgg11",), "vit": ("vit_tiny",)}
"""The networks of the paper's main figures by family."""
SCORES = ("snr", "magnitude", "squared_sum")
GUIDES = {"mean_field": "Bayesian", "deterministic": "deterministic"}
CLOSE, CALIBRATED = 1.0, 0.01
"""Points of accuracy, and of MACE, within which two curves count as the same; the paper names no margin."""
PAPER_SAMPLES = 10
"""The paper's weight samples a batch."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All finished levels (``Finished.all_levels``, with ``base``: at the protocol's own learning rate), and the layers
    of the last level of each run.
    """

    levels: pd.DataFrame
    layers: pd.DataFrame

    def curve(
        self, arch: str, guide: str = "mean_field", score: str = "snr", treatment: str = "imp", rewind: str = "init"
    ) -> Curve:
        """One kind of ticket of one network."""
        if guide == "deterministic" or treatment == "transplant":
            score = "magnitude"
        if treatment == "transplant":
            guide = "mean_field"
        frame = treated(self.levels, arch=arch, guide=guide, score=score, treatment=treatment, rewind=rewind, base=True)
        return Curve(frame)

    def networks(self, family: str) -> list[str]:
        """The networks of a family that have runs, or the family's first."""
        found = [arch for arch in SMALL[family] if (self.levels["arch"] == arch).any()]
        return found or [SMALL[family][-1]]

    def all_networks(self) -> list[str]:
        """The networks of the paper's main figures that have runs, or one of each family."""
        found = [arch for archs in SMALL.values() for arch in archs if (self.levels["arch"] == arch).any()]
        return found or [archs[-1] for archs in SMALL.values()]


def claim_1(e: Evidence) -> list[Part]:
    """Winning tickets exist in BNNs: some level of at least 50 % sparsity matches the dense BNN.

    d = accuracy(level) − accuracy(dense) per seed; a level matches if mean(d) ≥ −SE(d) and SE(d) ≤ 1 point, so that
    noise alone makes no match. The sparsest such level is reported, else the best. Fails if at every such level the
    95 % interval of d is below 0.
    """
    return [_winning(arch, e.curve(arch)) for arch in e.all_networks()]


def _winning(arch: str, curve: Curve) -> Part:
    gaps, wanted = curve.from_dense("accuracy"), f"≥ −SE, SE ≤ {CLOSE:g}"
    density = curve.frame.groupby("level")["density"].mean()
    found = {level: gaps[level].dropna() for level in gaps.columns if density[level] <= 0.5}
    if not found:
        return Part(f"{arch}: accuracy − dense", wanted, (), UNKNOWN, tuple(curve.runs))
    enough = {level: d for level, d in found.items() if len(d) >= MIN_SEEDS}
    matching = [level for level, d in enough.items() if d.mean() >= -standard_error(d) and standard_error(d) <= CLOSE]
    fails = bool(enough) and all(below("", d, ()).verdict == HOLDS for d in enough.values())
    level = max(matching) if matching else max(found, key=lambda level: found[level].mean())
    what = f"{arch}: accuracy − dense at {100 * density[level]:.3g} % remaining"
    verdict = HOLDS if matching else FAILS if fails else UNKNOWN
    return Part(what, wanted, tuple(found[level]), verdict, tuple(curve.runs))


def claim_2(e: Evidence) -> list[Part]:
    """ResNet: above 98 % sparsity squared_sum and the deterministic baseline fall faster than snr and magnitude.

    fall = accuracy(dense) − mean accuracy at density ≤ 2 %; the fall of each of the two minus that of each of the
    others is above 0. That accuracy "falls gradually" has no threshold in the paper and is left to figure 1.
    """
    parts = []
    for arch in e.networks("resnet"):
        curves = {score: e.curve(arch, score=score) for score in SCORES}
        curves["deterministic"] = e.curve(arch, "deterministic")
        fall = {name: c.dense("accuracy") - c.at("accuracy", 0, 0.02) for name, c in curves.items()}
        for fast in ("squared_sum", "deterministic"):
            for slow in ("snr", "magnitude"):
                runs = [*curves[fast].runs, *curves[slow].runs]
                parts.append(above(f"{arch}: fall of {fast} − fall of {slow}", fall[fast] - fall[slow], runs))
    return parts


def claim_3(e: Evidence) -> list[Part]:
    """VGG11: up to 90 % sparsity every score stays within 1 point of dense, and the scores do not differ.

    At the level of density ≥ 10 % where it is furthest (by the mean over seeds), accuracy − accuracy(dense) of every
    score is within ±1, and so is the difference of every two scores.
    """
    parts = []
    for arch in e.networks("vgg"):
        curves = {score: e.curve(arch, score=score).up_to(0.1) for score in SCORES}
        for score, c in curves.items():
            parts.append(
                judged(f"{arch}: {score} − dense", -CLOSE, CLOSE, _worst(c.from_dense("accuracy"), abs), c.runs)
            )
        for a, b in itertools.combinations(SCORES, 2):
            gap, runs = _worst(curves[a].gaps(curves[b], "accuracy"), abs), [*curves[a].runs, *curves[b].runs]
            parts.append(judged(f"{arch}: {a} − {b}", -CLOSE, CLOSE, gap, runs))
    return parts


def _worst(gaps: pd.DataFrame, badness: Callable[[float], float]) -> pd.Series:
    """The column of the level whose mean over seeds is worst."""
    if gaps.empty:
        return pd.Series(dtype=float)
    return gaps[max(gaps.columns, key=lambda level: badness(gaps[level].mean()))]


def claim_4(e: Evidence) -> list[Part]:
    """ViT: Bayesian above deterministic; snr and magnitude rise to about 50 % sparsity and fall past 90 %; squared_sum falls steadily.

    Mean over levels of accuracy(snr) − accuracy(deterministic) above 0; accuracy at density 35 to 65 % minus dense
    above 0 and accuracy at density ≤ 10 % minus that at 35 to 65 % below 0 (snr, magnitude); both below 0 (squared_sum).
    """
    parts = []
    for arch in e.networks("vit"):
        snr, deterministic = e.curve(arch), e.curve(arch, "deterministic")
        ahead = snr.ahead_of(deterministic, "accuracy")
        parts.append(above(f"{arch}: Bayesian − deterministic", ahead, [*snr.runs, *deterministic.runs]))
        for score in SCORES:
            c = e.curve(arch, score=score)
            middle = c.at("accuracy", 0.35, 0.65)
            first = below if score == "squared_sum" else above
            parts.append(first(f"{arch}: {score} at half − dense", middle - c.dense("accuracy"), c.runs))
            parts.append(below(f"{arch}: {score} past 90 % − at half", c.at("accuracy", 0, 0.1) - middle, c.runs))
    return parts


def claim_5(e: Evidence) -> list[Part]:
    """MACE falls at high sparsity for ResNet and ViT and stays constant for VGG.

    Mean MACE at density ≤ 5 % minus MACE(dense), score snr: below 0, and for VGG within ±0.01.
    """
    parts = []
    for family in SMALL:
        for arch in e.networks(family):
            c = e.curve(arch)
            change = c.at("mace", 0, 0.05) - c.dense("mace")
            what = f"{arch}: MACE at high sparsity − dense"
            same = judged(what, -CALIBRATED, CALIBRATED, change, c.runs)
            parts.append(same if family == "vgg" else below(what, change, c.runs))
    return parts


def claim_6(e: Evidence) -> list[Part]:
    """Deeper layers are pruned more, and more so in Bayesian than in deterministic networks.

    ρ = Spearman's rank correlation of depth and sparsity over the layers of the last level, without shortcuts; ρ above
    0 for both, and ρ(Bayesian, snr) − ρ(deterministic) above 0.
    """
    parts = []
    for arch in e.all_networks():
        rho, runs = {}, {}
        for name, curve in (("Bayesian", e.curve(arch)), ("deterministic", e.curve(arch, "deterministic"))):
            rho[name], runs[name] = rank_correlation(e.layers[e.layers["run"].isin(curve.runs)]), curve.runs
            parts.append(above(f"{arch}: ρ of depth and sparsity, {name}", rho[name], curve.runs))
        both = [*runs["Bayesian"], *runs["deterministic"]]
        parts.append(above(f"{arch}: ρ, Bayesian − deterministic", rho["Bayesian"] - rho["deterministic"], both))
    return parts


def claim_7(e: Evidence) -> list[Part]:
    """The IMP ticket is the ceiling of all randomised controls.

    accuracy(ticket) − accuracy(control) at the level where it is least (by the mean over seeds), above 0 for every
    control, Bayesian and deterministic.
    """
    parts = []
    for arch in e.all_networks():
        for guide, name in GUIDES.items():
            for control in CONTROLS:
                ticket, randomised = e.curve(arch, guide), e.curve(arch, guide, treatment=control)
                least = _worst(ticket.gaps(randomised, "accuracy"), lambda gap: -gap)
                parts.append(above(f"{arch}, {name}: ticket − {control}", least, [*ticket.runs, *randomised.runs]))
    return parts


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
                parts.append(above(f"{arch}: reinit − shuffle_layerwise", ahead, [*reinit.runs, *layerwise.runs]))
    return parts


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
                parts.append(below(what, ahead, runs) if family == "vit" else above(what, ahead, runs, -CLOSE))
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

    Ratio of the mean training seconds per level, within 3 to 7; and at the sparsest transplanted level k the saving
    1 − (Σ_{i<k} det_i + transplant_k) / Σ_{i≤k} VI_i, above 0.5. Both are costs of the paper's ten weight samples a batch,
    and judged with these alone.
    """
    parts = []
    for arch in e.all_networks():
        vi, deterministic, moved = e.curve(arch), e.curve(arch, "deterministic"), e.curve(arch, treatment="transplant")
        seconds = {name: c.by_level("train_seconds") for name, c in (("vi", vi), ("det", deterministic))}
        runs = [*vi.runs, *deterministic.runs]
        samples = sorted(vi.frame["train_samples"].unique()) or [PAPER_SAMPLES]
        what = f"{arch}: seconds, Bayesian / deterministic, weight samples: {' '.join(map(str, samples))}"
        costs = [judged(what, 3, 7, seconds["vi"].mean(axis=1) / seconds["det"].mean(axis=1), runs)]
        saving = {}
        for seed, row in moved.by_level("train_seconds").iterrows():
            k = row.last_valid_index()
            needed = {
                name: frame.reindex(index=[seed], columns=range(k + 1)).loc[seed] for name, frame in seconds.items()
            }
            cost = needed["det"][:k].sum(skipna=False) + row[k]
            saving[seed] = 1 - cost / needed["vi"].sum(skipna=False)
        what = f"{arch}: compute saved by transplantation"
        costs.append(above(what, pd.Series(saving, dtype=float), [*runs, *moved.runs], 0.5))
        parts += [part if samples == [PAPER_SAMPLES] else replace(part, verdict=UNKNOWN) for part in costs]
    return parts


def claim_12(e: Evidence) -> list[Part]:
    """LRR beats IMP for ResNet (both) and deterministic VGG; for Bayesian VGG and ViT only at high sparsity.

    Mean over levels of accuracy(LRR) − accuracy(IMP), above 0; for Bayesian VGG and ViT above 0 at density ≤ 10 % and
    not (below 1 point) at higher density.
    """
    parts = []
    for family, guides in (
        ("resnet", ("mean_field", "deterministic")),
        ("vgg", ("mean_field", "deterministic")),
        ("vit", ("mean_field",)),
    ):
        for arch in e.networks(family):
            for guide in guides:
                lrr, imp = e.curve(arch, guide, rewind="lr"), e.curve(arch, guide)
                runs, name = [*lrr.runs, *imp.runs], GUIDES[guide]
                if family == "resnet" or guide == "deterministic":
                    parts.append(above(f"{arch}, {name}: LRR − IMP", lrr.ahead_of(imp, "accuracy"), runs))
                    continue
                what = f"{arch}, {name}: LRR − IMP at"
                parts.append(above(f"{what} high sparsity", lrr.ahead_of(imp, "accuracy", 0, 0.1), runs))
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
            parts.append(above(f"{pair}: accuracy, large − small", b.ahead_of(a, "accuracy"), runs))
            shape = a.by_level("accuracy").corrwith(b.by_level("accuracy"), axis=1)
            parts.append(above(f"{pair}: correlation of the curves", shape, runs))
            if LARGER[small] == "vgg19":
                drop = b.sparsest("accuracy") - b.dense("accuracy")
                parts.append(above("vgg19: sparsest − dense", drop, b.runs, -CLOSE))
    return parts


def claim_14(e: Evidence) -> list[Part]:
    """A low learning rate gives matching tickets at a lower ceiling; warm-up equals the high rate at medium sparsity; a high rate is best at high sparsity.

    Low and high are the least and the greatest rate of a network's runs by snr. The low rate's best accuracy at
    density ≤ 50 % minus its dense one, above −1 point; its greatest accuracy minus the protocol's own rate's, below 0;
    accuracy(high, warm-up) − accuracy(high) at density 10 to 50 %, within ±1; accuracy(high) minus the better of the
    other rates at density ≤ 5 %, above 0.
    """
    return [part for arch in e.all_networks() for part in _rates(e, arch)]


def _rates(e: Evidence, arch: str) -> list[Part]:
    rows = treated(e.levels, arch=arch, guide="mean_field", score="snr")
    plain, warm = rows[rows["warmup_epochs"] == 0], rows[rows["warmup_epochs"] > 0]
    curves = {rate: Curve(plain[plain["lr"] == rate]) for rate in sorted(plain["lr"].unique())}
    base, none, runs = e.curve(arch), pd.Series(dtype=float), list(rows["run"].unique())
    low, high = (curves[min(curves)], curves[max(curves)]) if len(curves) > 1 else (Curve(plain[:0]), Curve(plain[:0]))
    sparse = low.frame[low.frame["density"] <= 0.5].groupby("seed")["accuracy"].max()
    best = {name: c.by_level("accuracy").max(axis=1) for name, c in (("low", low), ("base", base))}
    lowest_is_base = bool(set(low.runs) & set(base.runs))
    others = pd.DataFrame({rate: c.at("accuracy", 0, 0.05) for rate, c in curves.items() if c is not high})
    warmed = Curve(warm[warm["lr"].isin(high.frame["lr"])]).ahead_of(high, "accuracy", 0.1, 0.5)
    ceiling = none if lowest_is_base else best["low"] - best["base"]
    ahead = high.at("accuracy", 0, 0.05) - others.max(axis=1)
    return [
        above(f"{arch}: low rate, best sparse − dense", sparse - low.dense("accuracy"), runs, -CLOSE),
        below(f"{arch}: low rate's ceiling − the usual rate's", ceiling, runs),
        judged(f"{arch}: high rate, warm-up − none", -CLOSE, CLOSE, warmed, runs),
        above(f"{arch}: high rate − the others at high sparsity", ahead, runs),
    ]


CLAIMS = (
    claim_1, claim_2, claim_3, claim_4, claim_5, claim_6, claim_7, claim_8, claim_9, claim_10, claim_11, claim_12,
    claim_13, claim_14,
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim with its statistics and its verdict."""

    number: int
    text: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        return together(part.verdict for part in self.parts)


def judge(evidence: Evidence) -> list[Claim]:
    """All claims."""
    return [
        Claim(number, str(claim.__doc__).split("\n")[0].rstrip("."), claim(evidence))
        for number, claim in enumerate(CLAIMS, start=1)
    ]


def gather(
    root: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> tuple[Evidence, list[str]]:
    """The evidence in a folder of runs, of one protocol or of all but ``custom``, and a line per protocol that says what
    it is.
    """
    runs = [run for run in tables.list_runs(root) if run.folder.results()]
    found = {protocol_of(run.config) for run in runs if data in (None, run.config.data_name)}
    names = [protocol] if protocol else sorted(found - {"custom"}) or [None]
    studies = [read(root, name, data, accuracy) for name in names]
    parts = []
    for study in studies:
        complete = {str(r.folder.path) for r in study.runs if len(r.folder.results()) == r.config.levels + 1}
        frame = study.all_levels.assign(protocol=study.protocol)
        parts.append(frame[(frame["treatment"] != "imp") | frame["run"].isin(complete)])
    levels = pd.concat(parts, ignore_index=True)
    for arch, several in levels.groupby("arch")["protocol"].unique().items():
        if len(several) > 1:
            raise UserError(f"{root} has {arch} under the protocols {', '.join(several)}; choose one with --protocol")
    lines = []
    for study in studies:
        seeds = levels[levels["protocol"] == study.protocol].groupby("arch")["seed"].nunique()
        counts = ", ".join(f"{arch} ({count} seed{'s' * (count > 1)})" for arch, count in seeds.items())
        lines.append(f"{counts}: {study.description}")
    return Evidence(levels, pd.concat([s.layers for s in studies], ignore_index=True)), lines


def markdown(claims: Sequence[Claim], lines: Sequence[str], accuracy: str) -> str:
    """A table of verdicts, then the statistics behind each."""
    out = [*(f"- {line}" for line in lines), f"- accuracy: {ACCURACIES[accuracy]}", ""]
    out += ["| # | claim | statistics that hold / fail / cannot tell | verdict |", "|---" * 4 + "|"]
    for claim in claims:
        verdicts = [part.verdict for part in claim.parts]
        counts = " / ".join(str(verdicts.count(v)) for v in (HOLDS, FAILS, UNKNOWN))
        out.append(f"| {claim.number} | {claim.text} | {counts} | **{claim.verdict}** |")
    out += ["", "| # | statistic | value [95 % interval over seeds] | seeds | holds if | verdict |", "|---" * 6 + "|"]
    for claim in claims:
        for part in claim.parts:
            out.append(
                f"| {claim.number} | {part.what} | {_value(part)} | {len(part.values)} | {part.wanted} | {part.verdict} |"
            )
    return "\n".join(out) + "\n"


def _value(part: Part) -> str:
    if not part.values:
        return "no runs"
    low, high = part.interval
    return f"{part.mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if len(part.values) > 1 else "")


def to_json(claims: Sequence[Claim], lines: Sequence[str], accuracy: str, root: Path) -> list[dict[str, object]]:
    """The claims as plain values: verdict, statistics with value, interval and one number per seed, and their runs."""

    def plain(part: Part) -> dict[str, object]:
        known = len(part.values) > 1
        runs = [str(Path(run).relative_to(root)) for run in part.runs]
        return asdict(part) | {
            "mean": part.mean if part.values else None, "interval": part.interval if known else None, "runs": runs,
        }  # fmt: skip

    evidence = {"evidence": list(lines), "accuracy": accuracy}
    return [
        {"claim": c.number, "text": c.text, "verdict": c.verdict, **evidence, "parts": [*map(plain, c.parts)]}
        for c in claims
    ]


def write(
    root: Path, folder: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> str:
    """Judge all claims from the runs in ``root`` and write ``claims.md`` and ``claims.json``; returns the Markdown."""
    evidence, lines = gather(root, protocol, data, accuracy)
    claims = judge(evidence)
    text = markdown(claims, lines, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "claims.md", text.encode())
    files.write_json(folder / "claims.json", to_json(claims, lines, accuracy, root))
    return text


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m experiments.claims", str(__doc__))
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("-o", "--output", type=Path, help="folder for claims.md and claims.json; default: RUNS/figures")
    parser.add_argument("--protocol", help="judge the runs of one protocol alone")
    parser.add_argument("--data", help="which runs, where the folder holds those of several data sets")
    parser.add_argument("--accuracy", default="test_accuracy", help=f"{' or '.join(ACCURACIES)} (the paper's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)
    folder = given.output or given.runs / "figures"

    def work() -> None:
        print(write(given.runs, folder, given.protocol, given.data, given.accuracy))

    return run_command("python -m experiments.claims", work, arguments)


if __name__ == "__main__":
    sys.exit(main())
