"""Guides of one joint Gaussian."""

import pyro.distributions as dist
import torch
from pyro.infer import autoguide as A
from pyro.infer.autoguide import AutoLowRankMultivariateNormal

import pyro_lottery as pl
from pyro_lottery import guides
from pyro_lottery.guides.joint import marginal


def test_a_joint_guide_is_restored_from_its_raw_parameters(tiny_model):
    guide = pl.guides.auto(AutoLowRankMultivariateNormal, tiny_model)
    with torch.no_grad():
        guide.cov_factor.normal_()
    saved = pl.posterior(guide)
    fresh = pl.guides.auto(AutoLowRankMultivariateNormal, tiny_model)
    guides.set_posterior_(fresh, saved)
    assert all(torch.equal(saved.scale[s], v) for s, v in pl.posterior(fresh).scale.items())
    # marginal scale: root of the diagonal of F Fᵀ + D, with the rows of the first site first
    posterior = guide.get_posterior()
    variance = (posterior.cov_factor @ posterior.cov_factor.mT).diagonal() + posterior.cov_diag
    torch.testing.assert_close(saved.scale["conv.weight"].flatten(), variance[:36].sqrt())


def test_low_rank_marginals_are_its_covariances_diagonal(tiny_model):
    guide = pl.guides.auto(A.AutoLowRankMultivariateNormal, tiny_model)
    with torch.no_grad():
        guide.cov_factor.copy_(torch.randn_like(guide.cov_factor))
    joint = guide.unmasked()
    posterior = pl.posterior(guide)
    flat = torch.cat([t.reshape(-1) for t in posterior.scale.values()])
    torch.testing.assert_close(flat**2, joint.covariance_matrix.diagonal())
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in posterior.loc.values()]), joint.loc)
    assert posterior.draws == 0


def test_marginals_of_joint_guides_are_the_covariance_of_the_survivors():
    covariance = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]])
    joint = dist.MultivariateNormal(torch.arange(3.0), covariance)
    found = marginal(joint, torch.tensor([0, 2]))
    torch.testing.assert_close(found.covariance_matrix, covariance[[0, 2]][:, [0, 2]])
    torch.testing.assert_close(found.loc, torch.tensor([0.0, 2.0]))


def test_marginals_of_weights_that_hardly_differ():
    """Their covariance is singular in single precision, and its factor is not."""
    tril = torch.eye(6) * 1e-5
    tril[:, 0] = 1.0
    tril.requires_grad_()
    found = marginal(dist.MultivariateNormal(torch.zeros(6), scale_tril=tril), torch.tensor([1, 3, 5]))
    torch.testing.assert_close(found.scale_tril @ found.scale_tril.mT, torch.ones(3, 3))
    differences = found.rsample((2000,)).diff(dim=-1)
    assert 0.8 < float(differences.detach().std()) / (2**0.5 * 1e-5) < 1.2
    differences.square().sum().backward()
    assert bool(tril.grad.isfinite().all())


def test_the_places_of_surviving_weights_are_found_once_a_mask(tiny_model):
    guide = pl.guides.auto(A.AutoDiagonalNormal, tiny_model)
    mask = {"conv.weight": torch.rand(tiny_model.initial_values()["conv.weight"].shape) < 0.5}
    with pl.handlers.sparsify(mask):
        first = guide.get_posterior()
        second = guide.get_posterior()
    assert second.index is first.index
    with pl.handlers.sparsify({"conv.weight": ~mask["conv.weight"]}):
        other = guide.get_posterior()
    assert not torch.equal(other.index, first.index)
