import math

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery.types import Posterior


def posterior(**sites):
    loc = {n: torch.tensor(v) for n, v in sites.items()}
    return Posterior(loc, {n: torch.ones_like(t) for n, t in loc.items()}, tuple(n for n in loc if n != "bias"))


def test_full_covers_the_prunable_sites_alone():
    mask = pl.masks.full(posterior(a=[[1.0, 2.0]], bias=[1.0]))
    assert list(mask) == ["a"]
    assert pl.masks.density(mask) == 1


def test_prunes_the_lowest_globally_by_hand():
    p = posterior(a=[0.5, -0.1, 3.0], b=[0.2, -0.3])
    mask = pl.masks.shrink(pl.masks.full(p), pl.scores.magnitude(p), 0.4)
    assert mask["a"].tolist() == [True, False, True]
    assert mask["b"].tolist() == [False, True]
    assert (pl.masks.remaining(mask), pl.masks.total(mask)) == (3, 5)
    assert pl.masks.density_per_site(mask) == {"a": pytest.approx(2 / 3), "b": 0.5}


@pytest.mark.parametrize(
    ("count", "fraction", "pruned"),
    [(10, 0.2, 2), (8, 0.2, 2), (6, 0.2, 2), (4, 0.2, 1), (30, 0.1, 3), (100, 0.29, 29)],
)
def test_exact_counts_by_ceiling(count, fraction, pruned):
    # 0.1 · 30 and 0.29 · 100 are above 3 and 29 in floating point; the fraction means the decimal that was written.
    p = posterior(a=torch.rand(count).tolist())
    assert pl.masks.remaining(pl.masks.shrink(pl.masks.full(p), pl.scores.magnitude(p), fraction)) == count - pruned


def test_twenty_levels_leave_the_papers_density():
    p = posterior(a=torch.rand(100_000).tolist())
    mask = pl.masks.full(p)
    expected = 100_000
    for _ in range(20):
        smaller = pl.masks.shrink(mask, pl.scores.random(p), 0.2)
        expected -= math.ceil(expected / 5)
        assert pl.masks.remaining(smaller) == expected
        assert not (smaller["a"] & ~mask["a"]).any(), "masks must be nested"
        mask = smaller
    assert pl.masks.density(mask) == pytest.approx(0.8**20, abs=1e-4)


def test_ties_fall_in_order_every_time():
    p = posterior(a=[1.0] * 4, b=[1.0] * 4)
    with pytest.warns(UserWarning, match=r"at density 37.50% no weight is left of 'a'; the layer's output no longer"):
        mask = pl.masks.shrink(pl.masks.full(p), pl.scores.magnitude(p), 0.6)
    assert mask["a"].tolist() == [False] * 4
    assert mask["b"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_pruned_is_the_head_of_a_stable_sort_of_the_survivors(seed):
    random = torch.Generator().manual_seed(seed)
    choice = torch.tensor([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, math.inf, -math.inf])
    score = choice[torch.randint(8, (3, 40), generator=random)]
    mask = torch.rand(3, 40, generator=random) < 0.8
    smaller = pl.masks.shrink({"w": mask}, {"w": score}, 0.3)["w"].flatten()
    survivors = mask.flatten().nonzero().squeeze(1)
    count = math.ceil(0.3 * len(survivors))
    expected = survivors[score.flatten()[survivors].sort(stable=True).indices[count:]].sort().values
    assert torch.equal(smaller.nonzero().squeeze(1), expected)


def test_a_layer_is_told_of_once_when_its_last_weight_goes():
    p = posterior(a=[1.0], b=[2.0, 3.0, 4.0, 5.0, 6.0], c=[7.0])
    with pytest.warns(UserWarning, match="no weight is left of 'a'"):
        mask = pl.masks.shrink(pl.masks.full(p), pl.scores.magnitude(p), 0.2)
    mask = pl.masks.shrink(mask, pl.scores.magnitude(p), 0.4)  # warnings are errors here
    assert [int(m.sum()) for m in mask.values()] == [0, 2, 1]


def test_what_would_prune_everything_is_refused():
    p = posterior(a=[1.0, 2.0])
    one = {"a": torch.tensor([True, False])}
    with pytest.raises(pl.UserError, match=r"no weight would survive: 1 are left, and --prune-fraction 0.2 prunes 1"):
        pl.masks.shrink(one, pl.scores.magnitude(p), 0.2)
    assert [pl.masks.times(n, 0.2) for n in (0, 1, 2, 3, 4, 6, 8, 10)] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_masks_without_a_site():
    assert pl.masks.density({}) == 1
    assert (pl.masks.remaining({}), pl.masks.total({}), pl.masks.density_per_site({})) == (0, 0, {})
    with pytest.raises(pl.UserError, match="nothing can be pruned: the network needs random weights in"):
        pl.masks.shrink({}, {}, 0.2)
    for shuffle in (pl.masks.shuffle_global, pl.masks.shuffle_layerwise, pl.masks.shuffle_even):
        assert shuffle({}, torch.Generator()) == {}


def test_pruned_weights_never_return_whatever_their_score():
    p = posterior(a=[1.0, 2.0, 3.0, 4.0])
    mask = {"a": torch.tensor([False, True, True, True])}
    smaller = pl.masks.shrink(mask, {"a": torch.tensor([torch.nan, 2.0, 3.0, 4.0])}, 0.3)
    assert smaller["a"].tolist() == [False, False, True, True]
    assert mask["a"].tolist() == [False, True, True, True], "the old mask must stay as it was"
    assert p.loc["a"][0] == 1


def test_apply_zeroes_loc_and_scale():
    p = pl.masks.apply({"a": torch.tensor([True, False])}, posterior(a=[1.0, 2.0], bias=[3.0]))
    assert p.loc["a"].tolist() == [1.0, 0.0]
    assert p.scale["a"].tolist() == [1.0, 0.0]
    assert p.loc["bias"].tolist() == [3.0]


def test_zeroed_is_0_where_pruned_and_keeps_the_layout_of_a_convolution():
    mask = torch.arange(24).view(2, 3, 2, 2) % 2 == 0
    value = torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    found = pl.masks.zeroed(value, mask)
    assert torch.equal(found, mask.float())
    assert found.stride() == value.stride()
    assert torch.equal(
        pl.masks.zeroed(torch.full((5, 2, 3, 2, 2), torch.nan), mask).isnan(), mask.expand(5, 2, 3, 2, 2)
    )
    assert pl.masks.zeroed(value, None) is value


def test_bad_input_is_named():
    p = posterior(a=[1.0, 2.0])
    mask = pl.masks.full(p)
    for fraction in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(pl.UserError, match="between 0 and 1"):
            pl.masks.shrink(mask, pl.scores.magnitude(p), fraction)
    with pytest.raises(pl.UserError, match="NaN"):
        pl.masks.shrink(mask, {"a": torch.tensor([1.0, math.nan])}, 0.5)
    with pytest.raises(pl.UserError, match="the score does not fit: a is missing"):
        pl.masks.shrink(mask, {}, 0.5)


def test_a_mask_holds_true_and_false_or_1_and_0():
    p = posterior(a=[[1.0, 2.0], [3.0, 4.0]], bias=[1.0])
    half = torch.tensor([[True, False], [False, True]])
    for same in (half, half.float(), half.to(torch.uint8), half.numpy()):
        assert pl.masks.apply({"a": same}, p).loc["a"].tolist() == [[1, 0], [0, 4]]
        assert pl.masks.remaining({"a": same}) == 2
        shrunk = pl.masks.shrink({"a": same}, pl.scores.magnitude(p), 0.5)["a"]
        assert shrunk.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: pl.masks.apply({"aa": p.loc["a"] > 2}, p), "the mask does not fit: aa is not in the posterior"),
        (lambda p: pl.masks.apply({"a": p.loc["a"][0] > 1}, p), r"a is \(2,\), but the posterior's is \(2, 2\)"),
        (
            lambda p: pl.masks.remaining(p.loc),
            "mask of site 'a' must hold True and False, or 1 and 0, got torch.float32",
        ),
        (lambda p: pl.masks.shrink(p.loc, p.loc, 0.5), "mask of site 'a' must hold True and False"),
        (lambda p: pl.handlers.sparsify(p.scale | {"a": torch.full((2, 2), math.nan)}), "'a' must hold True and False"),
        (lambda p: pl.handlers.sparsify(p), "a mask is a dict with a bool tensor per site, got a Posterior"),
        (lambda p: pl.handlers.sparsify({"a": [True, False]}), "mask of site 'a' must be a bool tensor, got a list"),
        (lambda p: pl.masks.shrink(pl.masks.full(p), p.loc, "0.5"), "fraction must be between 0 and 1.* got '0.5'"),
        (lambda p: pl.masks.shrink_to(pl.masks.full(p), p.loc, 2.5), "weights that are left must be a whole number"),
    ],
)
def test_what_is_no_mask_is_named(call, message):
    with pytest.raises(pl.UserError, match=message):
        call(posterior(a=[[1.0, 2.0], [3.0, 4.0]], bias=[1.0]))
