import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size
from torch.distributions import kl_divergence

from pyro_lottery import kernels
from pyro_lottery.distributions import Draw, Labels, PointMass, Pruned, SiteNormal, base, elementary, one_number
from pyro_lottery.kernels import Layout

SHAPES = [Size((4, 3, 3, 3)), Size((4,)), Size((6, 5))]


@pytest.fixture(params=["auto", "torch"])
def draw(request):
    masks = [torch.rand(SHAPES[0]) < 0.4, None, torch.zeros(SHAPES[2], dtype=torch.bool)]
    layout = Layout(SHAPES, masks)
    loc = torch.randn(layout.offsets[-1]).requires_grad_()
    log_scale = (torch.randn(layout.offsets[-1]) - 2).requires_grad_()
    with kernels.using(request.param):
        yield Draw(loc, log_scale, layout)


def test_samples_and_their_gradients_are_the_plain_distributions(draw):
    sites = [SiteNormal(draw, i) for i in range(3)]
    values = [site.rsample() for site in sites]
    noise = [
        ((v - s.loc) / torch.where(s.scale > 0, s.scale, 1.0)).detach() for v, s in zip(values, sites, strict=True)
    ]
    weights = [torch.randn(shape) for shape in SHAPES]
    inputs = (draw.loc, draw.log_scale)
    fused = torch.autograd.grad(sum((w * v.sin()).sum() for w, v in zip(weights, values, strict=True)), inputs)
    plain = [s.loc + s.scale * e for s, e in zip(sites, noise, strict=True)]
    eager = torch.autograd.grad(sum((w * v.sin()).sum() for w, v in zip(weights, plain, strict=True)), inputs)
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pruned_weights_are_zero_in_every_view(draw):
    for i, mask in enumerate(draw.layout.masks):
        site = SiteNormal(draw, i)
        for value in (site.rsample(), site.rsample(), site.loc, site.scale, draw.means[i], draw.variances[i]):
            assert value.shape == SHAPES[i]
            if mask is not None:
                assert not value[~mask].any()
                assert (value[mask] != 0).all()


def test_the_first_sample_is_shared_and_the_next_are_new(draw):
    site = SiteNormal(draw, 1)
    first, second, third = site.rsample(), site.rsample(), site.rsample()
    assert first is draw.samples[1]
    assert not torch.equal(second, third)
    many = SiteNormal(draw, 1).rsample((4000,))
    assert ((many.mean(0) - site.loc).abs() < 4 * site.scale / 4000**0.5).all()


def test_log_prob_and_kl_are_those_of_pyros_normal(draw):
    for i, mask in enumerate(draw.layout.masks):
        site, value = SiteNormal(draw, i), torch.randn(SHAPES[i])
        keep = torch.ones(SHAPES[i], dtype=torch.bool) if mask is None else mask
        normal = dist.Normal(site.loc, torch.where(keep, site.scale, 1.0))
        torch.testing.assert_close(site.log_prob(value), normal.log_prob(value) * keep)
        for prior in (dist.Normal(0.3, 2.0), dist.Laplace(0.0, 1.0)):
            expected = kl_divergence(normal, prior.expand(SHAPES[i])) * keep
            torch.testing.assert_close(kl_divergence(site, prior.expand(SHAPES[i])), expected)
    with pytest.raises(NotImplementedError):
        kl_divergence(SiteNormal(draw, 1), dist.StudentT(3.0).expand(SHAPES[1]))


@pytest.mark.parametrize("moments", [False, True])
def test_the_shared_kl_is_the_sum_of_torchs_and_so_is_its_gradient(draw, moments):
    (draw.means if moments else draw.samples)[0].sum()
    m, s = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 2.0, 0.5])
    kl, weight = draw.kl(m, s), torch.tensor([1.0, 0.3, 2.0])
    sites = [SiteNormal(draw, i) for i in range(3)]
    expected = torch.stack([kl_divergence(q, dist.Normal(a, b)).sum() for q, a, b in zip(sites, m, s, strict=True)])
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    inputs = (draw.loc, draw.log_scale)
    for a, b in zip(
        torch.autograd.grad((weight * kl).sum(), inputs), torch.autograd.grad((weight * expected).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_kl_that_nobody_takes_costs_no_gradient(draw):
    grads = torch.autograd.grad(draw.samples[1].sum(), (draw.loc, draw.log_scale))
    start, stop = draw.layout.offsets[1:3]
    assert torch.equal(grads[0].nonzero().squeeze(1), torch.arange(start, stop))
    assert not grads[1][:start].any()


def test_a_second_backward_pass_gives_the_same_gradient(draw):
    loss = sum(v.square().sum() for v in draw.samples)
    inputs = (draw.loc, draw.log_scale)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True))


def test_one_number_priors_are_told_from_others():
    shape = (3, 2)
    loc, scale = one_number(dist.Normal(torch.tensor(0.5), torch.tensor(2.0)).expand(shape).to_event(2))
    assert (loc.item(), scale.item()) == (0.5, 2.0)
    mask = torch.ones(shape, dtype=torch.bool)
    pruned = Pruned(dist.Normal(torch.zeros(()), torch.ones(())).expand(shape), mask).to_event(2)
    assert one_number(pruned, mask) is not None
    assert one_number(pruned, mask.clone()) is None
    assert one_number(dist.Normal(torch.zeros(shape), 1.0).to_event(2)) is None
    assert one_number(dist.Laplace(0.0, 1.0).expand(shape)) is None
    learned = torch.ones((), requires_grad=True)
    assert one_number(dist.Normal(torch.zeros(()), learned).expand(shape)) is None
    assert base(dist.Normal(0.0, 1.0).expand(shape).to_event(2)).batch_shape == shape


@pytest.mark.parametrize("moments", [False, True])
def test_expanded_and_strided_gradients_are_read_as_what_they_are(draw, moments):
    values = (*draw.means, *draw.variances) if moments else draw.samples
    plain = (*draw.locs, *(s.square() for s in draw.scales)) if moments else None
    if plain is None:
        noise = [(v - m).detach() for v, m in zip(values, draw.locs, strict=True)]
        plain = [
            m + s * torch.where(s > 0, e / s, 0.0).detach()
            for m, s, e in zip(draw.locs, draw.scales, noise, strict=True)
        ]
    inputs = (draw.loc, draw.log_scale)

    def gradients(tensors):
        strided = torch.arange(8.0).view(4, 2)[:, 1]
        loss = sum(t.sum() for t in tensors) + (tensors[1] * strided).sum() + tensors[0].mean(0).sum()
        return torch.autograd.grad(loss + (tensors[2].T @ torch.ones(6, 2)).sum(), inputs)

    for a, b in zip(gradients(values), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_use_the_torch_backend_and_keep_their_type(dtype):
    layout = Layout(SHAPES)
    loc = torch.randn(layout.total, dtype=dtype).requires_grad_()
    log_scale = torch.full((layout.total,), -2.0, dtype=dtype).requires_grad_()
    draw = Draw(loc, log_scale, layout)
    assert all(v.dtype == dtype for v in draw.samples)
    kl = draw.kl(torch.zeros(3), torch.ones(3)).sum()
    kl.backward()
    torch.testing.assert_close(loc.grad, loc.detach(), rtol=1e-2, atol=1e-2)


def test_priors_of_another_precision_give_the_same_kl_and_gradient(draw):
    inputs = (draw.loc, draw.log_scale)
    m, s = torch.tensor([0.3, 0.0, 1.0]), torch.tensor([0.7, 1.0, 2.0])
    found = []
    for dtype in (torch.float32, torch.float64):
        again = Draw(*inputs, draw.layout)
        again.samples[0].sum()
        found.append(torch.autograd.grad(again.kl(m.to(dtype), s.to(dtype)).sum(), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_default_type_of_double_changes_nothing(draw):
    torch.manual_seed(0)
    usual = Draw(draw.loc, draw.log_scale, draw.layout).samples
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        again = Draw(draw.loc, draw.log_scale, draw.layout).samples
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


def test_second_derivatives_are_refused(draw):
    (first,) = torch.autograd.grad(sum((v**3).sum() for v in draw.samples), draw.loc, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


def test_a_sample_without_gradient_leaves_the_shared_draw_alone(draw):
    SiteNormal(draw, 0).sample()
    assert SiteNormal(draw, 1).rsample().requires_grad


def test_elements_are_found_inside_events_and_masks():
    inner = dist.Normal(torch.zeros(3, 2), 1.0)
    masked = inner.to_event(1).mask(torch.tensor([True, False, True]))
    assert elementary(masked) is base(inner.to_event(1).to_event(1)) is inner
    assert base(masked) is masked


def test_labels_are_a_categorical_whose_log_probability_is_the_cross_entropy():
    scores, y = torch.randn(7, 4, requires_grad=True), torch.randint(4, (7,))
    ours, theirs = Labels(scores), dist.Categorical(logits=scores)
    torch.testing.assert_close(ours.log_prob(y), theirs.log_prob(y))
    for a, b in zip(*(torch.autograd.grad(fn.log_prob(y).sum(), scores) for fn in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    several = torch.arange(4)[:, None].expand(4, 7)
    torch.testing.assert_close(ours.log_prob(several), theirs.log_prob(several))
    torch.testing.assert_close(ours.expand((3, 7)).log_prob(y), theirs.expand((3, 7)).log_prob(y))
    torch.testing.assert_close(ours.probs, theirs.probs)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.enumerate_support(), theirs.enumerate_support())
    assert ours.sample().shape == (7,)
    assert ours.support.is_discrete
    with pytest.raises(ValueError, match="within the support"):
        ours.log_prob(torch.full((7,), 4))


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_that_no_class_has_is_an_error(label):
    with pyro.validation_enabled(False), pytest.raises(IndexError):
        Labels(torch.randn(7, 4)).log_prob(torch.full((7,), label))


def test_a_point_mass_has_the_density_of_pyros():
    v = torch.randn(3, 4)
    for dims in (0, 1, 2):
        mass, theirs = PointMass(v, dims), dist.Delta(v, event_dim=dims)
        assert (mass.batch_shape, mass.event_shape) == (theirs.batch_shape, theirs.event_shape)
        assert torch.equal(mass.log_prob(v), theirs.log_prob(v))
        assert torch.equal(
            mass.expand((2, *mass.batch_shape)).log_prob(v), theirs.expand((2, *mass.batch_shape)).log_prob(v)
        )
        assert mass.rsample() is not v
        assert torch.equal(mass.rsample(), v)
