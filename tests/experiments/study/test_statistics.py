"""Tests of means over seeds: known answers, and how often verdicts are wrong in made-up studies."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.study import statistics
from experiments.study.statistics import (
    EQUIVALENT,
    FAILS,
    HOLDS,
    UNKNOWN,
    Curve,
    above,
    at_every_level,
    bca,
    below,
    corrected,
    interval,
    judged,
    p_above,
    p_outside,
    p_within,
    shared,
    sign_flip,
    together,
)
from experiments.study.verdicts.layers_and_controls import _ceiling
from experiments.study.verdicts.tickets import _winning

STUDIES = 500
WRONG = 0.05
"""How often a verdict may be wrong. Each is wrong in 2.5 % of studies at most, which of 500 made-up ones are hardly ever 5 %."""


def verdict(part):
    return corrected([part])[0].verdict


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (above("a", [1.0, 1.2, 1.1], ()), HOLDS),
        (above("a", [-1.0, -1.2, -1.1], ()), FAILS),
        (above("a", [-1.0, 1.2, 0.5], ()), UNKNOWN),
        (above("a", [1.0, 1.2], ()), UNKNOWN),
        (above("a", [0.1, -0.1, 0.0], (), margin=1.0), EQUIVALENT),
        (above("a", [0.1, -0.1, 0.0], ()), UNKNOWN),
        (below("a", [-1.0, -1.2, -1.1], (), margin=1.0), HOLDS),
        (below("a", [1.4, 1.3, 1.2], (), bound=1.0), FAILS),
        (judged("a", -1, 1, [0.1, 0.2, -0.1], ()), HOLDS),
        (judged("a", -1, 1, [2.0, 2.1, 2.2], ()), FAILS),
        (judged("a", -1, 1, [-2.0, -2.1, -2.2], ()), FAILS),
        (judged("a", -1, 1, [0.9, 1.0, 1.1], ()), UNKNOWN),
        (at_every_level("a", -1, 1, pd.DataFrame({1: [0.1, 0.2, 0.1], 2: [-0.2, 0.1, 0.2]}), ()), HOLDS),
        (at_every_level("a", -1, 1, pd.DataFrame({1: [0.1, 0.2, 0.1], 2: [-0.2, 2.1, 0.2]}), ()), UNKNOWN),
        (at_every_level("a", -1, 1, pd.DataFrame({1: [0.1, 0.2, 0.1], 2: [4.2, 4.1, 4.2]}), ()), FAILS),
        (at_every_level("a", -1, 1, pd.DataFrame(), ()), UNKNOWN),
    ],
)
def test_verdicts_each_way(part, expected):
    assert verdict(part) == expected
    assert together([part]) == expected


def test_p_values_are_those_of_scipy():
    values = [0.3, 1.4, -0.2, 0.9, 0.8]
    for bound in (-1.0, 0.0, 0.7):
        assert p_above(values, bound) == pytest.approx(stats.ttest_1samp(values, bound, alternative="greater").pvalue)
    low, high = (stats.ttest_1samp(values, b, alternative=a).pvalue for b, a in ((-1.0, "greater"), (1.0, "less")))
    assert p_within(values, -1, 1) == pytest.approx(max(low, high))
    assert p_outside(values, -1, 1) == pytest.approx(min(1, 2 * min(1 - low, 1 - high)))
    exact = stats.permutation_test(
        (np.array(values) - 0.1,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert sign_flip(values, 0.1) == pytest.approx(exact.pvalue)
    least, most = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx((least, most))


def test_three_seeds_cannot_reach_5_percent_by_sign_flips():
    assert sign_flip([1.0] * 3) == 1 / 8
    assert sign_flip([1.0] * 5) == 1 / 32
    assert 2 * sign_flip([1.0] * 6) == 1 / 32
    assert sign_flip([1.0 + i / 100 for i in range(20)]) < 1e-3  # by random flips


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_mean(seeds):
    rng = np.random.default_rng(seeds)
    found = [interval(rng.normal(2.0, 3.0, seeds)) for _ in range(4000)]
    assert 0.93 < np.mean([low <= 2.0 <= high for low, high in found]) < 0.97


def test_bootstrap_intervals_of_few_seeds_are_too_narrow():
    """Which is why no verdict uses them."""
    assert bca([1.0, 2.0, 3.0]) is bca([1.0] * 6) is None
    rng = np.random.default_rng(0)
    found = [bca(rng.normal(0, 1, 5)) for _ in range(300)]
    assert 0.75 < np.mean([low <= 0 <= high for low, high in found]) < 0.92


def noise(rng, seeds, levels):
    """Of each seed, and of each level of a seed."""
    return rng.normal(0, 0.6, (seeds, 1)) + rng.normal(0, 0.8, (seeds, levels))


def rates(study):
    """How often a made-up study has each verdict, and how often any of its parts does: ``study(rng)`` gives the parts."""
    rng = np.random.default_rng(0)
    claims, parts = [], []
    for _ in range(STUDIES):
        found = study(rng)
        claims.append(together(found))
        parts.append({part.verdict for part in corrected(found)})
    kinds = (HOLDS, FAILS, EQUIVALENT)
    return {v: claims.count(v) / STUDIES for v in kinds}, {v: np.mean([v in p for p in parts]) for v in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
class TestWrongVerdicts:
    def test_claim_7_where_all_true_gaps_are_0(self, seeds):
        """Controls as good as the ticket: neither above 0 on average, nor more than a point below at a level."""

        def study(rng):
            return [_ceiling(f"net, {i}: ticket − control", pd.DataFrame(noise(rng, seeds, 20)), []) for i in range(8)]

        claim, part = rates(study)
        assert max(claim[HOLDS], claim[FAILS], part[HOLDS], part[FAILS]) <= WRONG

    def test_claim_7_where_one_level_is_a_point_below(self, seeds):
        gaps = np.full(20, 2.0)
        gaps[7] = -1.0

        def study(rng):
            return [_ceiling("net: ticket − control", pd.DataFrame(gaps + noise(rng, seeds, 20)), []) for _ in range(2)]

        claim, part = rates(study)
        assert max(claim[HOLDS], claim[FAILS], part[HOLDS], part[FAILS]) <= WRONG

    def test_claim_3_where_every_level_is_a_point_away(self, seeds):
        """On the bound, so that both verdicts are wrong; with less noise, since more leaves all undecided."""

        def study(rng):
            frames = (pd.DataFrame(1.0 + noise(rng, seeds, 7) / 5) for _ in range(6))
            return [at_every_level("net: a − b", -1, 1, frame, []) for frame in frames]

        claim, part = rates(study)
        assert max(claim[HOLDS], claim[FAILS], part[HOLDS], part[FAILS]) <= WRONG

    def test_claim_1_where_every_sparse_level_is_half_a_point_below(self, seeds):
        def study(rng):
            accuracy = np.concatenate([[90.0], np.full(20, 89.5)]) + noise(rng, seeds, 21) / 3
            rows = [
                {"seed": seed, "level": level, "density": 0.8**level, "accuracy": accuracy[seed, level], "run": "r"}
                for seed in range(seeds)
                for level in range(21)
            ]
            return [_winning("net", Curve(pd.DataFrame(rows)))]

        claim, _ = rates(study)
        assert max(claim[HOLDS], claim[FAILS]) <= WRONG

    @pytest.mark.parametrize("parts", [1, 4, 24])
    def test_parts_on_their_bound(self, seeds, parts):
        def study(rng):
            return [above(f"net: {i}", noise(rng, seeds, 1)[:, 0], [], margin=1.0) for i in range(parts)]

        claim, part = rates(study)
        assert max(claim[HOLDS], claim[FAILS], part[HOLDS], part[FAILS]) <= WRONG

    def test_parts_on_their_margin_are_not_equivalent(self, seeds):
        def study(rng):
            return [above(f"net: {i}", 1.0 + noise(rng, seeds, 1)[:, 0] / 3, [], margin=1.0) for i in range(4)]

        claim, part = rates(study)
        assert max(claim[EQUIVALENT], part[EQUIVALENT]) <= WRONG


def test_a_level_far_below_is_not_equivalent_on_average():
    steady = np.linspace(-0.05, 0.05, 5)[:, None]
    gaps = pd.DataFrame(np.array([1.0, 1.0, 0.5, -2.1]) + steady)
    assert verdict(_ceiling("net: ticket − control", gaps, [])) == FAILS
    assert _ceiling("net: ticket − control", gaps, []).p_equivalent > 0.5
    assert (
        verdict(_ceiling("net: ticket − control", pd.DataFrame(np.array([0.1, -0.2, 0.1, 0.0]) + steady), []))
        == EQUIVALENT
    )


def test_levels_that_a_seed_lacks_are_not_compared():
    rows = [{"seed": s, "level": k, "density": 0.5**k, "accuracy": 10.0 * k + s} for s in range(3) for k in range(4)]
    whole, part = Curve(pd.DataFrame(rows)), Curve(pd.DataFrame([r for r in rows if (r["seed"], r["level"]) != (2, 3)]))
    other = Curve(whole.frame.assign(accuracy=whole.frame["accuracy"] - whole.frame["level"]))
    assert part.gaps(other, "accuracy").columns.tolist() == [1, 2]
    assert part.ahead_of(other, "accuracy").tolist() == [1.5, 1.5, 1.5]
    assert whole.ahead_of(other, "accuracy").tolist() == [2.0, 2.0, 2.0]


def test_equal_values_are_not_certain():
    assert verdict(above("a", [1.0] * 3, ())) == UNKNOWN
    assert verdict(above("a", [1.0] * 6, ())) == HOLDS
    assert p_above([1.0] * 6, 0.0) == sign_flip([1.0] * 6) == 1 / 64


def test_equal_values_in_single_precision_are_equal():
    """Five images of 500 more, three times: a point each, but for the rounding of accuracies."""
    pairs = ((445, 440), (381, 376), (17, 12))
    gaps = [100 * float(np.float32(a / 500)) - 100 * float(np.float32(b / 500)) for a, b in pairs]
    assert len(set(gaps)) > 1
    assert p_above(gaps, 0.0) == sign_flip(gaps) == 1 / 8
    assert p_above(gaps, 1.0) == sign_flip(gaps, 1.0) == 1.0
    assert p_within(gaps, -1, 1) == 1.0
    assert p_within(gaps, -1, 1.1) == 1 / 8
    assert bca([*gaps, *gaps]) is None


def test_a_failure_is_corrected_over_its_tests():
    """Two bounds are two tests, and each level has its own."""
    two = judged("a", -1, 1, [1.5, 1.7, 1.9], ())
    assert two.tests == 2
    assert two.mean - 1 > two.smallest * 0.99 or verdict(two) == UNKNOWN
    far = [1 + 1.01 * two.smallest + v - two.mean for v in two.values]
    near = [1 + 0.99 * two.smallest + v - two.mean for v in two.values]
    assert (verdict(judged("a", -1, 1, far, ())), verdict(judged("a", -1, 1, near, ()))) == (FAILS, UNKNOWN)
    levels = pd.DataFrame({1: [0.1, 0.2, 0.1], 4: [-0.2, 2.1, 0.2]})
    part = at_every_level("a", -1, 1, levels, ())
    assert (part.what, part.tests, part.p_flips) == ("a, worst at level 4", 4, None)


def test_the_level_that_speaks_against_a_ceiling_is_shown():
    gaps = pd.DataFrame(np.array([5.0, 5.0, 5.0, 5.0, -3.0]) + np.linspace(-0.05, 0.05, 5)[:, None])
    part = _ceiling("net: ticket − control", gaps, [])
    assert (part.what, part.mean) == ("net: ticket − control, worst at level 4", pytest.approx(-3.0))
    assert (part.p_flips, part.p_holds) == (1.0, pytest.approx(1.0))
    assert verdict(part) == FAILS
    good = _ceiling("net: ticket − control", gaps.drop(columns=4), [])
    assert (good.what, good.mean, good.p_flips) == ("net: ticket − control", pytest.approx(5.0), 1 / 32)


def test_levels_that_not_all_seeds_have_are_in_no_mean():
    rows = [{"seed": s, "level": k, "density": 0.5**k, "x": 10.0 * k} for s in range(3) for k in range(4)]
    whole, part = Curve(pd.DataFrame(rows)), Curve(pd.DataFrame(rows[:-1]))
    assert whole.at("x").tolist() == [20.0] * 3
    assert part.at("x").tolist() == part.sparsest("x").sub(5).tolist() == [15.0] * 3
    assert [c.at("x").tolist() for c in shared(whole, part)] == [[15.0] * 3] * 2
    assert Curve(whole.frame.replace(30.0, math.nan)).at("x").isna().all()
    rounded = Curve(whole.frame.assign(density=whole.frame["density"] - 1e-6))
    assert rounded.at("x", 0.25, 0.5).tolist() == [15.0] * 3  # a mask keeps whole weights


def test_the_smallest_effect_that_seeds_could_have_shown():
    part = above("a", [-1.0, 1.2, 0.5], ())
    assert part.smallest == pytest.approx(interval(part.values)[1] - part.mean)
    assert verdict(above("a", [v + 1.01 * part.smallest - part.mean for v in part.values], ())) == HOLDS
    assert verdict(above("a", [v + 0.99 * part.smallest - part.mean for v in part.values], ())) == UNKNOWN
    assert math.isinf(above("a", [1.0], ()).smallest)


def test_doctests_name_what_they_do():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
