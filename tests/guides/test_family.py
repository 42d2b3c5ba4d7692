"""Every family answers the same questions."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as A

import pyro_lottery as pl
from pyro_lottery.guides.adapted_laplace import StockLaplace
from pyro_lottery.guides.family import family
from pyro_lottery.guides.joint import StockJoint
from pyro_lottery.guides.lists import StockList
from pyro_lottery.guides.stock import Drawn, StockDelta, StockNormal, StockStructured
from tests.guides.models import nested

CLASSES = {
    A.AutoNormal: StockNormal,
    A.AutoDelta: StockDelta,
    A.AutoDiagonalNormal: StockJoint,
    A.AutoMultivariateNormal: StockJoint,
    A.AutoLowRankMultivariateNormal: StockJoint,
    A.AutoLaplaceApproximation: StockLaplace,
    A.AutoIAFNormal: Drawn,
    A.AutoStructured: StockStructured,
}
WITH_MARGINALS = [kind for kind, of in CLASSES.items() if not issubclass(of, Drawn)]


def of_kind(kind):
    return lambda model: pl.guides.auto(kind, model, 0.3)


def of_list(model):
    guide = pl.guides.auto(A.AutoGuideList, model)
    guide.append(pl.guides.mean_field(poutine.block(model, hide=["out.weight"])))
    guide.append(pl.guides.auto(A.AutoNormal, poutine.block(model, expose=["out.weight"])))
    return guide


MAKES = [pl.guides.mean_field, pl.guides.deterministic, of_list, *map(of_kind, WITH_MARGINALS)]


@pytest.mark.parametrize("kind", CLASSES)
def test_pyros_guides_have_one_family_whether_adapted_or_not(kind, tiny_model):
    class Own(kind):
        """A subclass of the user's."""

    guide = kind(tiny_model)
    guide()
    for each in (guide, pl.guides.auto(kind, tiny_model), pl.guides.auto(Own, tiny_model)):
        assert type(family(each)) is CLASSES[kind]
    pyro.clear_param_store()


def test_our_guides_are_their_own_family_and_anything_else_is_drawn_from(tiny_model):
    for make in (pl.guides.mean_field, pl.guides.deterministic):
        guide = make(tiny_model)
        assert family(guide) is guide
    assert type(family(of_list(tiny_model))) is StockList
    assert type(family(lambda: None)) is Drawn
    assert not pl.guides.is_point(lambda: None)


@pytest.mark.parametrize("make", MAKES)
def test_locs_are_views_of_the_parameters_in_the_networks_order(make, tiny_model):
    own = family(make(tiny_model))
    assert list(own.locs()) == list(tiny_model.sites)
    with torch.no_grad():
        for number, loc in enumerate(own.locs().values()):
            loc.fill_(number)
    for number, (name, loc) in enumerate(own.locs().items()):
        assert (loc == number).all()
        assert loc.shape == own.sites()[name].real_shape == tiny_model.initial_values()[name].shape


@pytest.mark.parametrize("make", MAKES)
def test_points_have_no_scales_and_others_one_for_each_site(make, tiny_model):
    own = family(make(tiny_model))
    assert list(own.scales()) == ([] if own.is_point else list(tiny_model.sites))
    assert own.is_point == (make is pl.guides.deterministic or isinstance(own, StockDelta | StockLaplace))


@pytest.mark.parametrize("make", [*MAKES, of_kind(A.AutoIAFNormal), of_kind(A.AutoStructured)])
def test_set_takes_another_guides_posterior_bit_for_bit(make, tiny_model):
    guide, other = make(tiny_model), make(tiny_model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    posterior = pl.posterior(guide)
    with torch.no_grad():
        family(other).set_(posterior)
    again = pl.posterior(other)
    assert all(torch.equal(again.loc[name], loc) for name, loc in posterior.loc.items())
    assert all(torch.equal(again.scale[name], scale) for name, scale in (posterior.scale or {}).items())
    assert bool(posterior.extra) == (not family(guide).is_determined)


@pytest.mark.parametrize("make", MAKES)
def test_values_are_those_of_a_guide_without_noise(make, tiny_model):
    own = family(make(tiny_model))
    locs = own.locs()
    for name, value in own.values().items():
        assert torch.equal(value, locs[name])
        assert value.data_ptr() != locs[name].data_ptr()


def test_locs_alone_decay(tiny_model):
    sizes = {make: sum(p.numel() for p in family(make(tiny_model)).loc_parameters()) for make in MAKES}
    assert set(sizes.values()) == {sum(value.numel() for value in tiny_model.initial_values().values())}
    assert family(pl.guides.auto(A.AutoIAFNormal, tiny_model)).loc_parameters() == []


@pytest.mark.parametrize("make", [pl.guides.mean_field, of_kind(A.AutoNormal), of_kind(A.AutoDiagonalNormal)])
def test_what_is_not_finite_is_named_by_site_or_else_by_parameter(make, tiny_model):
    guide = make(tiny_model)
    assert pl.guides.not_finite(guide) == []
    family(guide).locs()["hidden.weight"][0] = torch.nan
    assert pl.guides.not_finite(guide) == ["hidden.weight"]


def test_scales_that_are_not_finite_are_named_too(tiny_model):
    ours, stock = pl.guides.mean_field(tiny_model), pl.guides.auto(A.AutoDiagonalNormal, tiny_model)
    with torch.no_grad():
        ours.unpack(ours.log_scale)["conv.bias"][0] = torch.inf
        next(p for name, p in stock.named_parameters() if "scale" in name)[0] = torch.inf
    assert pl.guides.not_finite(ours) == ["conv.bias"]
    assert pl.guides.not_finite(stock) == ["scale"]


def test_a_draw_alone_tells_the_sites_of_pyros_guides():
    assert family(pl.guides.mean_field(nested)).drawn_shapes() == {"w": (3,), "a": (4, 1), "b": (4, 5, 2)}
    assert family(pl.guides.auto(A.AutoNormal, nested)).drawn_shapes() is None


def test_a_posterior_that_lacks_a_site_does_not_fit_a_guide_that_is_drawn_from(tiny_model):
    guide = pl.guides.auto(A.AutoIAFNormal, tiny_model)
    posterior = pl.posterior(guide, draws=2)
    loc = {name: value for name, value in posterior.loc.items() if name != "out.bias"}
    with pytest.raises(pl.UserError, match=r"^loc/out\.bias is missing$"):
        pl.guides.set_posterior_(guide, pl.Posterior(loc, posterior.scale, posterior.prunable, posterior.extra))
