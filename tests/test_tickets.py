"""The laws of the randomised controls and of the transplant, on hand-made tickets."""

import pytest
import torch
from torch.nn.utils import prune

import pyro_lottery as pl
from pyro_lottery import masks, tickets
from pyro_lottery.types import Posterior, Ticket

SHAPES = {"conv": (5, 3, 3, 3), "deep": (40, 7), "last": (11,)}
DENSITY = {"conv": 0.9, "deep": 0.1, "last": 0.0}


def dense(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {"bias": (4,)}
    loc = {n: torch.randn(s, generator=generator) + 3 for n, s in shapes.items()}
    scale = {n: torch.rand(s, generator=generator) + 0.1 for n, s in shapes.items()}
    start = Posterior(loc, scale, tuple(SHAPES))
    return tickets.rewind(masks.full(start), start, {"bn.weight": torch.randn(3, generator=generator)})


@pytest.fixture
def ticket():
    generator = torch.Generator().manual_seed(9)
    mask = {n: torch.rand(s, generator=generator) < DENSITY[n] for n, s in SHAPES.items()}
    start = dense(0)
    return tickets.rewind(mask, start.start, start.net)


def counts(mask):
    return {name: int(m.sum()) for name, m in mask.items()}


def same(a: Ticket, b: Ticket):
    pairs = [(a.mask, b.mask), (a.start.loc, b.start.loc), (a.start.scale, b.start.scale), (a.net, b.net)]
    return all(torch.equal(x[n], y[n]) for x, y in pairs for n in x)


def values_are(found: Ticket, source: Ticket):
    """Survivors hold the values of ``source`` bit for bit, pruned weights (0, 0); what is not pruned is whole."""
    for sites, first in ((found.start.loc, source.start.loc), (found.start.scale, source.start.scale)):
        for name, value in sites.items():
            mask = found.mask.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(mask, first[name], 0.0))
    assert torch.equal(found.net["bn.weight"], source.net["bn.weight"])


def test_reinit_keeps_the_mask_bit_for_bit_and_draws_the_values_anew(ticket):
    found = tickets.reinit(ticket, 5, dense)
    assert all(torch.equal(found.mask[n], m) for n, m in ticket.mask.items())
    assert (found.start.loc["conv"] != ticket.start.loc["conv"])[ticket.mask["conv"]].all()
    assert (found.start.loc["bias"] != ticket.start.loc["bias"]).all()
    assert (found.net["bn.weight"] != ticket.net["bn.weight"]).all()
    assert all((t[~found.mask[n]] == 0).all() for n, t in found.start.loc.items() if n in found.mask)


def test_shuffle_global_keeps_the_total(ticket):
    found = tickets.shuffle(ticket, 5, dense(0), "shuffle_global")
    assert masks.remaining(found.mask) == masks.remaining(ticket.mask)
    assert counts(found.mask) != counts(ticket.mask)
    values_are(found, dense(0))


def test_shuffle_even_gives_every_layer_the_global_density_to_one_weight(ticket):
    found = tickets.shuffle(ticket, 5, dense(0), "shuffle_even")
    density = masks.density(ticket.mask)
    for name, m in found.mask.items():
        assert abs(int(m.sum()) - density * m.numel()) < 1, name
    assert masks.remaining(found.mask) == masks.remaining(ticket.mask)
    values_are(found, dense(0))


def test_shuffle_layerwise_keeps_every_layers_count(ticket):
    found = tickets.shuffle(ticket, 5, dense(0), "shuffle_layerwise")
    assert counts(found.mask) == counts(ticket.mask)
    assert any(not torch.equal(found.mask[n], m) for n, m in ticket.mask.items())
    values_are(found, dense(0))


def test_even_counts_by_hand():
    mask = {"a": torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool(), "b": torch.zeros(4).bool(), "c": torch.zeros(3).bool()}
    even = masks.shuffle_even(mask, torch.Generator().manual_seed(0))
    # 5 of 15 survive: 8/3, 4/3 and 3/3 of the layers' weights; the largest remainder, a's, is rounded up.
    assert counts(even) == {"a": 3, "b": 1, "c": 1}


@pytest.mark.parametrize("control", tickets.CONTROLS)
def test_controls_are_pure_functions_of_ticket_and_seed(ticket, control):
    def made(seed):
        if control == "reinit":
            return tickets.reinit(ticket, seed, dense)
        return tickets.shuffle(ticket, seed, dense(0), control)

    before, state = same_copy(ticket), torch.get_rng_state()
    torch.manual_seed(1)
    first = made(5)
    torch.manual_seed(2)
    assert same(made(5), first)
    assert not same(made(6), first)
    assert same(before, ticket), "the ticket itself is untouched"
    torch.set_rng_state(state)
    made(5)
    assert torch.equal(torch.get_rng_state(), state), "no global generator moves"


def same_copy(ticket):
    def clone(sites):
        return {n: t.clone() for n, t in sites.items()}

    start = Posterior(clone(ticket.start.loc), clone(ticket.start.scale), ticket.start.prunable)
    return Ticket(clone(ticket.mask), start, clone(ticket.net))


def test_positions_of_a_shuffle_are_uniform():
    mask = {"a": torch.tensor([True, False, False, False])}
    hits = sum(masks.shuffle_global(mask, torch.Generator().manual_seed(s))["a"].double() for s in range(4000))
    assert ((hits - 1000).abs() < 4 * (4000 * 0.25 * 0.75) ** 0.5).all()


def plain(ticket):
    return {**ticket.start.loc, **ticket.net}


def test_a_transplant_takes_loc_and_mask_and_keeps_the_usual_scale(ticket):
    into = dense(3)
    found = tickets.transplant(plain(ticket), ticket.mask, into)
    expected = Ticket(ticket.mask, Posterior(ticket.start.loc, into.start.scale, into.start.prunable), ticket.net)
    values_are(found, expected)
    assert same(tickets.transplant(plain(ticket), None, into), found), "zeros are the mask"


def test_what_does_not_match_is_named(ticket):
    into, weights = dense(3), plain(ticket)
    for broken, message in [
        ({n: t for n, t in weights.items() if n != "deep"}, "deep is missing"),
        ({n: t for n, t in weights.items() if n != "bn.weight"}, r"bn\.weight is missing"),
        (weights | {"extra.weight": torch.ones(2)}, r"extra\.weight is not in the network"),
        (weights | {"deep": torch.ones(7, 40)}, r"deep is \(7, 40\), but the network's is \(40, 7\)"),
        (weights | {"bias": torch.full((4,), torch.nan)}, "bias holds values that are not finite"),
    ]:
        with pytest.raises(pl.UserError, match=message):
            tickets.transplant(broken, None, into)
    with pytest.raises(pl.UserError, match="mask of last is missing"):
        tickets.transplant(weights, {n: m for n, m in ticket.mask.items() if n != "last"}, into)
    with pytest.raises(pl.UserError, match="mask of other is not in the network"):
        tickets.transplant(weights, ticket.mask | {"other": torch.ones(4)}, into)
    found = tickets.transplant(weights, ticket.mask | {"bias": torch.ones(4)}, into)
    assert found.mask.keys() == ticket.mask.keys(), "a mask that keeps all of a bias prunes nothing"
    for name, what in (("bias", "is a bias or in the final layer"), ("bn.weight", "stays deterministic")):
        with pytest.raises(pl.UserError, match=f"the mask prunes '{name}', which {what}"):
            tickets.transplant(weights, ticket.mask | {name: torch.zeros_like(weights[name])}, into)


def test_a_mask_that_keeps_zeros_of_a_pruned_layer_contradicts_the_weights():
    weights = {"a": torch.tensor([1.0, 0.0, 2.0, 0.0]), "b": torch.zeros(2), "c": torch.ones(2)}
    dense = {name: torch.ones_like(value) for name, value in weights.items()}
    with pytest.raises(pl.UserError, match=r"the mask keeps 2 weights that are 0, 2 of them in 'a'"):
        tickets.check_mask(weights, {"a": dense["a"]})
    tickets.check_mask(weights, {"a": torch.tensor([1, 0, 0, 0]), "b": dense["b"], "c": dense["c"]})  # b began at 0
    tickets.check_mask(dense, {"a": torch.tensor([1, 0, 0, 0])})


def test_masks_of_torch_prune_are_baked_in():
    layer = torch.nn.Linear(6, 3)
    weight = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", amount=7)
    baked = tickets.bake_pruned(layer.state_dict())
    assert set(baked) == {"weight", "bias"}
    assert int((baked["weight"] == 0).sum()) == 7
    assert torch.equal(baked["weight"], weight * layer.weight_mask)


def test_overlap_by_hand():
    def with_mask(**sites):
        mask = {n: torch.tensor(v).bool() for n, v in sites.items()}
        return Ticket(mask, Posterior({n: m.float() for n, m in mask.items()}, None, tuple(mask)), {})

    a = with_mask(x=[1, 1, 0, 0], y=[0, 0])
    b = with_mask(x=[1, 0, 1, 0], y=[0, 0])
    table = pl.compare(a, b).set_index("layer")
    assert table["jaccard"].to_dict() == {"x": 1 / 3, "y": 1.0, "all": 1 / 3}
    # two random halves: 0.25 shared of 0.75
    assert table["chance"]["x"] == pytest.approx(0.25 / 0.75)
    assert table["chance"]["all"] == pytest.approx((1 / 9) / (2 / 3 - 1 / 9))
    assert (table["density_a"]["all"], table["density_b"]["x"]) == (2 / 6, 0.5)
    with pytest.raises(pl.UserError, match="mask of y is missing"):
        pl.compare(a, with_mask(x=[1, 0, 1, 0], z=[0, 0]))


def test_chance_is_what_random_masks_share():
    generator = torch.Generator().manual_seed(0)
    p, q, n = 0.3, 0.6, 4000
    x, y = torch.rand(200, n, generator=generator) < p, torch.rand(200, n, generator=generator) < q
    shared = ((x & y).sum(1) / (x | y).sum(1)).mean()
    assert float(shared) == pytest.approx(p * q / (p + q - p * q), abs=0.002)


def test_a_transplant_keeps_the_networks_own_attention_mask():
    into = dense(0)
    into = Ticket(into.mask, into.start, {"attention_mask": torch.tensor([0.0, -torch.inf])})
    weights = dict(dense(1).start.loc)
    found = tickets.transplant(weights | into.net, None, into)
    assert torch.equal(found.net["attention_mask"], into.net["attention_mask"])
    with pytest.raises(pl.UserError, match="attention_mask holds values that are not finite"):
        tickets.transplant(weights | {"attention_mask": torch.tensor([-torch.inf, 0.0])}, None, into)


def test_tickets_are_close_but_for_rounding():
    def made(loc, mask=(True, False), net=1.0):
        return pl.Ticket(
            {"w": torch.tensor(mask)}, pl.Posterior({"w": torch.tensor(loc)}, None, ("w",)), {"b": torch.tensor(net)}
        )

    one = made((0.5, 0.0))
    assert tickets.close(one, made((0.5 + 1e-7, 0.0)))
    assert not tickets.close(one, made((0.5001, 0.0)))
    assert not tickets.close(one, made((0.5, 0.0), mask=(False, True)))
    assert not tickets.close(one, made((0.5, 0.0), net=1.001))
    assert not tickets.close(one, pl.Ticket(one.mask, pl.Posterior(one.start.loc, one.start.loc, ("w",)), one.net))
