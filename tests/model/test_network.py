import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import timm
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from pyro_lottery.model import prunable_sites, random_parameters


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_sites_are_weights_and_biases_of_linear_conv_and_attention():
    assert [s for s, _, _ in random_parameters(Attention())] == [
        "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert prunable_sites(Attention()) == ("attention.in_proj_weight", "attention.out_proj.weight")


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "vit_tiny", "lenet"])
def test_normalisation_biases_and_the_classifier_are_not_prunable(name):
    net = pl.create_model(name)
    prunable = prunable_sites(net)
    final = net.get_classifier().weight
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(prunable) == len(layers) - 1
    assert not any("bias" in site for site in prunable)
    assert all(net.get_parameter(site) is not final for site in prunable)


@pytest.mark.parametrize("make", [lambda: pl.create_model("resnet20"), Attention, lambda: pl.create_model("vit_tiny")])
def test_mean_weight_logits_equal_the_plain_networks(make):
    net = make().eval()
    x = torch.randn(3, 5, 4) if isinstance(net, Attention) else torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        plain = net(x)
    model = pl.BayesianClassifier(copy.deepcopy(net), num_data=3)
    logits = pl.prediction.logits_mean(model, pl.guides.mean_field(model), x)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)


def test_attention_trains_as_sites():
    model = pl.BayesianClassifier(Attention(), num_data=6)
    guide = pl.guides.mean_field(model)
    terms = pl.ELBO().terms(model, guide, torch.randn(6, 5, 4), torch.arange(6) % 3)
    (terms.nll + terms.kl).backward()
    assert all((g != 0).any() for g in guide.unpack(guide.loc.grad).values())


def test_likelihood_counts_every_example_once_and_the_kl_once(tiny_model, tiny_data):
    # Row 1 of the complaints: with fixed parameters and BatchNorm in eval mode, the epoch's mean loss does not depend
    # on the batch size.
    tiny_model.eval()
    guide = pl.guides.deterministic(tiny_model)

    def epoch_mean(batch_size):
        starts = range(0, 60, batch_size)
        xy = [(tiny_data.train[s : s + batch_size], tiny_data.train.labels[s : s + batch_size]) for s in starts]
        losses = [pl.ELBO().differentiable_loss(tiny_model, guide, x, y) for x, y in xy]
        return (sum(loss * len(y) for loss, (_, y) in zip(losses, xy, strict=True)) / 60).item()

    assert epoch_mean(8) == pytest.approx(epoch_mean(64), rel=1e-5)
    nll = F.cross_entropy(pl.prediction.logits_mean(tiny_model, guide, tiny_data.train), tiny_data.train.labels)
    prior = torch.distributions.Normal(0.0, 1.0)
    log_prior = sum(prior.log_prob(loc).sum() for loc in pl.posterior(guide).loc.values())
    assert epoch_mean(8) == pytest.approx((60 * nll - 0.1 * log_prior).item(), rel=1e-5)


def test_everything_reachable_moves_with_to(tiny_model):
    guide = pl.guides.mean_field(tiny_model).to("meta")
    tiny_model.to("meta")
    tensors = [*tiny_model.parameters(), *tiny_model.buffers(), *guide.parameters(), *guide.buffers()]
    reached = [t for o in (tiny_model, guide) for t in _tensors(o, set())]
    assert len(reached) >= len(tensors) > 20
    assert {t.device.type for t in reached} == {"meta"}


def _tensors(value, seen):
    """Every tensor reachable from an object through attributes and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ != "builtins":
        yield from _tensors(vars(value), seen)


def test_a_model_is_sampled_without_data_and_batchnorm_does_not_notice(tiny_model):
    before = tiny_model.net_state()
    trace = poutine.trace(tiny_model).get_trace()
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == list(tiny_model.sites)
    assert all(torch.equal(before[n], t) for n, t in tiny_model.net_state().items())
    assert set(before) == {f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def test_two_networks_with_the_same_names_share_nothing(tiny_data):
    from tests.support import TinyNet

    def fresh(seed):
        torch.manual_seed(seed)
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        return model, pl.guides.mean_field(model)

    def trained(pair):
        return pl.posterior(pair[1]).loc["conv.weight"]

    options = {"epochs": 1, "train_samples": 1}
    alone = []
    for seed in (1, 2):
        pair = fresh(seed)
        for level in (0, 1):
            pl.train(*pair, tiny_data, level=level, **options)
        alone.append(trained(pair))
    together = [fresh(1), fresh(2)]
    for level in (0, 1):
        for pair in together:
            pl.train(*pair, tiny_data, level=level, **options)
    assert all(torch.equal(a, trained(b)) for a, b in zip(alone, together, strict=True))


def test_net_state_is_restored_bit_for_bit_and_checked(tiny_model, tiny_data):
    before = tiny_model.net_state()
    pl.train(tiny_model, pl.guides.mean_field(tiny_model), tiny_data, epochs=1, train_samples=1)
    assert not torch.equal(before["bn.running_mean"], tiny_model.net_state()["bn.running_mean"])
    tiny_model.load_net_state(before)
    assert all(torch.equal(before[n], t) for n, t in tiny_model.net_state().items())
    with pytest.raises(pl.UserError, match=r"net/bn\.bias is missing"):
        tiny_model.load_net_state({n: t for n, t in before.items() if n != "bn.bias"})
    with pytest.raises(pl.UserError, match="net/new is not in the network"):
        tiny_model.load_net_state(before | {"new": torch.ones(1)})
    with pytest.raises(pl.UserError, match=r"net/bn\.bias is \(2,\)"):
        tiny_model.load_net_state(before | {"bn.bias": torch.ones(2)})


def test_a_copied_model_trains_like_the_original(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    pl.train(tiny_model, guide, tiny_data, epochs=1, train_samples=1)
    twin = copy.deepcopy(tiny_model)
    twin_guide = pl.guides.mean_field(twin)
    pl.guides.set_posterior_(twin_guide, pl.posterior(guide))
    again = pl.guides.mean_field(tiny_model)
    pl.guides.set_posterior_(again, pl.posterior(guide))
    for model, g in ((tiny_model, again), (twin, twin_guide)):
        pl.train(model, g, tiny_data, epochs=1, train_samples=1, level=1)
    assert torch.equal(pl.posterior(again).loc["out.weight"], pl.posterior(twin_guide).loc["out.weight"])


def test_bad_numbers_are_named():
    with pytest.raises(pl.UserError, match="num_data"):
        pl.BayesianClassifier(nn.Linear(2, 2), num_data=0)
    with pytest.raises(pl.UserError, match="kl_temperature"):
        pl.BayesianClassifier(nn.Linear(2, 2), num_data=1, kl_temperature=0)
    model = pl.BayesianClassifier(nn.Linear(2, 2), num_data=1)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(pl.UserError, match="kl_temperature must be greater than 0"):
            model.kl_temperature = wrong
    assert model.kl_temperature == 1.0
    with pytest.raises(pl.UserError, match="no Linear, Conv"):
        pl.BayesianClassifier(nn.BatchNorm1d(2), num_data=1)


def test_what_nuts_samples_at_a_temperature():
    # y = Xw + noise, w ~ N(0, s²): p(w)^T·p(D|w) is a Gaussian of precision XᵀX/noise² + T/s². Scaled by 1/T as a whole,
    # the model has the density that the ELBO's optimum has, p(w)·p(D|w)^(1/T).
    noise, prior_scale, temperature = 0.5, 0.7, 0.25
    x, y = torch.randn(6, 2), torch.randn(6, 1)
    model = pl.BayesianRegressor(
        nn.Linear(2, 1, bias=False), pl.priors.normal(prior_scale), num_data=6, noise_scale=noise,
        kl_temperature=temperature,
    )  # fmt: skip
    precision = x.mT @ x / noise**2 + temperature * torch.eye(2) / prior_scale**2
    loc = torch.linalg.solve(precision, x.mT @ y / noise**2).squeeze(1)
    for power, sampled in ((1.0, model), (1 / temperature, poutine.scale(model, 1 / temperature))):
        expected = torch.distributions.MultivariateNormal(loc, precision_matrix=power * precision)
        _, potential, _, _ = initialize_model(sampled, (x, y))
        weights = torch.randn(5, 2)
        found = torch.stack([-potential({"weight": w[None]}) for w in weights])
        torch.testing.assert_close(found - found[0], expected.log_prob(weights) - expected.log_prob(weights[0]))

    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()["weight"].squeeze(1)
    exact = precision.inverse().diagonal().sqrt()
    torch.testing.assert_close(draws.std(0) / exact, torch.ones(2), rtol=0, atol=0.25)  # a factor 2 at 1/T


def test_no_device_is_guessed():
    # What a GPU would do, without one: fake tensors know their device and refuse to mix them.
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.support import TinyNet

    for prior, make in ((None, pl.guides.mean_field), (pl.priors.flat(), pl.guides.deterministic)):
        with FakeTensorMode(), pyro.validation_enabled(False):
            with torch.device("cuda"):
                net = TinyNet()
            model = pl.BayesianClassifier(net, prior, num_data=4)
            guide = make(model)
            x, y = torch.zeros(4, 1, 4, 4, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            terms = pl.ELBO().terms(model, guide, x, y)  # a fake tensor has no value: any .item() would raise
            assert (terms.nll + terms.kl).device.type == "cuda"


def test_both_heads_of_a_distilled_transformer_are_spared():
    net = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=16, num_classes=5)
    prunable = prunable_sites(net)
    assert "blocks.0.attn.qkv.weight" in prunable
    assert not {"head.weight", "head_dist.weight"} & set(prunable)


def test_gains_of_standardised_convolutions_stay_deterministic():
    names = {name for _, _, name in random_parameters(timm.create_model("nf_resnet26"))}
    assert names == {"weight", "bias"}


def test_layers_that_would_be_left_out_are_named():
    from tests.support import TinyNet

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(pl.UserError, match=r"'0\.weight' and '1\.weight' are one tied parameter"):
        pl.BayesianClassifier(tied, num_data=1)
    for change in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = TinyNet()
        change(net.hidden)
        with pytest.raises(pl.UserError, match=r"'hidden\.weight' is not a parameter"):
            pl.BayesianClassifier(net, num_data=1)
    net = TinyNet()
    pl.BayesianClassifier(net, num_data=1)
    with pytest.raises(pl.UserError, match="is already Bayesian"):
        pl.BayesianClassifier(net, num_data=1)


def test_a_ticket_drops_into_a_fresh_network_and_says_what_differs(tmp_path):
    from tests.support import TinyNet

    def fresh(classes=3):
        model = pl.BayesianClassifier(TinyNet(classes), num_data=60)
        return model, pl.guides.mean_field(model)

    model, guide = fresh()
    start = pl.posterior(guide)
    mask = pl.masks.shrink(pl.masks.full(start), pl.scores.magnitude(start), 0.5)
    pl.tickets.rewind(mask, start, model.net_state()).save(tmp_path / "ticket.safetensors")

    other, its_guide = fresh()
    found = other.start_from_(its_guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    assert all(torch.equal(found[n], m) for n, m in mask.items())
    expected = pl.masks.apply(mask, start)
    assert all(torch.equal(pl.posterior(its_guide).loc[n], t) for n, t in expected.loc.items())
    for mangled, message in (
        (pl.Ticket({n: m[:1] for n, m in mask.items()}, start, model.net_state()), r"mask/conv\.weight is \(1, 1, 3, 3\), but the network's is \(4,"),
        (pl.Ticket(mask, pl.Posterior({n: t / 0 for n, t in start.loc.items()}, start.scale, start.prunable),
                   model.net_state()), "not all finite"),
    ):  # fmt: skip
        with pytest.raises(pl.UserError, match=message):
            other.start_from_(its_guide, mangled)
    assert all(torch.equal(pl.posterior(its_guide).loc[n], t) for n, t in expected.loc.items()), "nothing was changed"
    larger, its_guide = fresh(classes=5)
    with pytest.raises(pl.UserError, match=r"the guide is of another model: out\.weight is \(5, 6\)"):
        other.start_from_(its_guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    with pytest.raises(
        pl.UserError,
        match=r"belongs to another network: loc/out\.weight is \(3, 6\), .* \(5, 6\); loc/out\.bias is \(3,\), .* \(5,\)$",
    ):
        larger.start_from_(its_guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))


def test_net_state_may_be_infinite_only_where_the_networks_own_is(tiny_model):
    tiny_model.net.bn.running_mean[1] = -torch.inf
    state = tiny_model.net_state()
    tiny_model.load_net_state(state)
    with pytest.raises(pl.UserError, match=r"net/bn\.running_mean holds values that are not finite"):
        tiny_model.load_net_state(state | {"bn.running_mean": torch.tensor([-torch.inf, 0.0, 0.0, 0.0])})


def test_a_network_in_float64_is_trained_in_float64():
    # One weight a site: KL(N(m, s²) ‖ N(0, 1)) and the likelihood by hand, to the last digits of float64.
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(0.1)
    model = pl.BayesianRegressor(net, num_data=3, noise_scale=0.5)
    guide = pl.guides.mean_field(model, init_scale=0.01)
    x, y = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[0.5], [0.0], [0.25]], dtype=torch.double)
    for estimator in ("weights", "local"):
        terms = pl.ELBO(estimator=estimator).terms(model, guide, x, y)
        assert {t.dtype for t in (terms.nll, terms.kl, terms.output, guide.loc)} == {torch.double}
        m, s = guide.loc.item(), guide.log_scale.exp().item()
        assert terms.kl.item() == pytest.approx((m**2 + s**2 - 1) / 2 - math.log(s), rel=1e-14)
        normal = torch.distributions.Normal(terms.output.detach(), 0.5)
        assert terms.nll.item() == pytest.approx(-normal.log_prob(y).sum().item(), rel=1e-14)
    w = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace())).get_trace(x).nodes
    assert torch.equal(w["_RETURN"]["value"], x.double() * w["weight"]["value"])
    assert pl.prediction.logits_mean(model, guide, x).flatten().tolist() == [0.1, 0.2, -0.1]
    assert poutine.trace(model).get_trace(x).nodes["weight"]["value"].dtype == torch.double, "priors too"


def test_a_classifier_in_float64_trains_prunes_and_is_saved(tiny_data, tmp_path):
    from tests.support import TinyNet

    model = pl.BayesianClassifier(TinyNet().double(), num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    mask = pl.masks.shrink(pl.masks.full(pl.posterior(guide)), pl.scores.magnitude(pl.posterior(guide)), 0.5)
    with pl.handlers.sparsify(mask):
        for estimator in ("weights", "local"):
            pl.train(model, guide, tiny_data, epochs=1, estimator=estimator)
        probs = pl.predict(model, guide, tiny_data.test, 3)
    assert probs.dtype == torch.double
    torch.testing.assert_close(probs.sum(-1), torch.ones(24, dtype=torch.double), rtol=0, atol=1e-12)
    found = pl.posterior(guide)
    pl.Ticket(mask, pl.masks.apply(mask, found), model.net_state()).save(tmp_path / "ticket.safetensors")
    loaded = pl.Ticket.load(tmp_path / "ticket.safetensors")
    assert loaded.start.loc["conv.weight"].dtype == torch.double
    assert torch.equal(loaded.start.scale["out.weight"], found.scale["out.weight"])


class Conv3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3, 4)))


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_weights_of_five_dimensions_train_and_are_pruned(estimator):
    pixels = torch.randint(0, 255, (12, 1, 4, 4), dtype=torch.uint8)
    data = pl.data.from_tensors(pixels, torch.arange(12) % 3, pixels, torch.arange(12) % 3)
    net = nn.Sequential(nn.Unflatten(2, (1, 4)), nn.Upsample(scale_factor=(2, 1, 1)), Conv3d())
    model = pl.BayesianClassifier(net, num_data=12)
    guide = pl.guides.mean_field(model)
    start = pl.posterior(guide)
    assert start.loc["2.conv.weight"].shape == (2, 1, 2, 2, 2)
    mask = pl.masks.shrink(pl.masks.full(start), pl.scores.magnitude(start), 0.25)
    with pl.handlers.sparsify(mask):
        pl.train(model, guide, data, epochs=1, estimator=estimator)
        drawn = poutine.trace(guide).get_trace().nodes["2.conv.weight"]["value"]
    assert torch.equal(drawn != 0, mask["2.conv.weight"])
    assert int(mask["2.conv.weight"].sum()) == 12
    changed = pl.posterior(guide).loc["2.conv.weight"] != start.loc["2.conv.weight"]
    assert bool(changed.all())


def test_what_is_no_tensor_is_named(tiny_data):
    from collections import namedtuple

    from tests.support import TinyNet

    Outputs = namedtuple("Outputs", ["logits", "aux"])

    class Auxiliary(TinyNet):
        def forward(self, x):
            logits = super().forward(x)
            return Outputs(logits, logits) if self.training else logits

    class Named(TinyNet):
        def forward(self, x):
            return {"logits": super().forward(x), "loss": None}

    model = pl.BayesianClassifier(Auxiliary(), num_data=60)
    guide = pl.guides.mean_field(model)
    assert pl.predict(model, guide, tiny_data.test, 1).shape == (24, 3)
    with pytest.raises(pl.UserError, match=r"returned a Outputs of \(60, 3\), \(60, 3\); .* aux_logits=False"):
        pl.train(model, guide, tiny_data, epochs=1)
    model = pl.BayesianClassifier(Named(), num_data=60)
    with pytest.raises(pl.UserError, match=r"returned a dict of \(24, 3\), NoneType; it must return one tensor"):
        pl.predict(model, pl.guides.mean_field(model), tiny_data.test, 1)


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_what_the_network_does_not_use_costs_its_kl(estimator):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 2)
            self.head = nn.Linear(2, 1)

        def forward(self, x):
            return F.linear(x, self.head.weight)

    model = pl.BayesianRegressor(Unused(), pl.priors.normal(0.5), num_data=4, noise_scale=1.0)
    guide = pl.guides.mean_field(model, init_scale=0.3)
    terms = pl.ELBO(estimator=estimator).terms(model, guide, torch.randn(4, 2), torch.randn(4, 1))
    prior, found = torch.distributions.Normal(0.0, 0.5), pl.posterior(guide)
    each = [torch.distributions.Normal(found.loc[site], found.scale[site]) for site in model.sites]
    assert len(each) == 4
    torch.testing.assert_close(terms.kl.detach(), sum(torch.distributions.kl_divergence(q, prior).sum() for q in each))


class TwoInputs(nn.Module):
    """A network with an image and a vector as inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(2, 1)

    def forward(self, image, vector):
        return self.left(image.flatten(1)) - self.right(vector)


@pytest.mark.parametrize("double", [False, True])
def test_several_inputs_as_tuple_list_and_mapping(double):
    net = TwoInputs().double() if double else TwoInputs()
    model = pl.BayesianRegressor(net, num_data=6, noise_scale=0.5)
    guide = pl.guides.deterministic(model)
    image, vector, y = torch.randn(3, 2, 2), torch.randn(3, 2), torch.randn(3, 1)
    w = pl.posterior(guide).loc
    expected = F.linear(image.flatten(1).to(w["left.weight"]), w["left.weight"], w["left.bias"])
    expected = expected - F.linear(vector.to(expected), w["right.weight"], w["right.bias"])
    for x in ((image, vector), [image, vector], {"vector": vector, "image": image}):
        terms = pl.ELBO().terms(model, guide, x, y)
        torch.testing.assert_close(terms.output.detach(), expected)
        nll = -torch.distributions.Normal(expected, 0.5).log_prob(y).sum() * 2  # 6 examples, 3 of them seen
        assert terms.nll.item() == pytest.approx(nll.item(), rel=1e-6)
    with pytest.raises(pl.UserError, match=r"the examples; got tensors of \(3, 2, 2\), \(2, 2\)"):
        model((image, vector[:2]), y)


def test_tally_by_hand():
    classifier = pl.BayesianClassifier(nn.Linear(1, 3), num_data=4)
    logits = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    assert classifier.task == "classification"
    assert classifier.tally(logits, torch.tensor([0, 1, 2, 0])).item() == 3

    regressor = pl.BayesianRegressor(nn.Linear(1, 2), num_data=2, noise_scale=1.0)
    assert regressor.task == "regression"
    found = regressor.tally(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
    assert found.item() == (1 + 4) / 2 + (9 + 1) / 2

    class Counts(pl.BayesianNetwork):
        def likelihood(self, output):
            return dist.Poisson(output[:, 0].exp())

    class NoMean(pl.BayesianNetwork):
        def likelihood(self, output):
            return dist.TransformedDistribution(dist.Normal(output[:, 0], 1.0), [dist.transforms.ELUTransform()])

    output, y = torch.tensor([[2.0], [3.0]]).log(), torch.tensor([0.0, 5.0])
    assert Counts(nn.Linear(1, 1), num_data=2).tally(output, y).item() == pytest.approx(8)
    assert NoMean(nn.Linear(1, 1), num_data=2).tally(output, y).isnan()


class Labels(pl.BayesianNetwork):
    """Several yes-or-no labels for each example."""

    def likelihood(self, output):
        return dist.Bernoulli(logits=output).to_event(1)


class PerElement(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.Normal(output, 1.0)


class OneForAll(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.Normal(output.mean(), 1.0)


class OfTorch(pl.BayesianNetwork):
    def likelihood(self, output):
        return torch.distributions.Normal(output[:, 0], 1.0)


def regressor(net, *, num_data):
    return pl.BayesianRegressor(net, num_data=num_data, noise_scale=0.5)


ZEROS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "outputs", "y", "message"),
    [
        (regressor, 1, torch.zeros(4), r"targets have shape \(4,\), but the likelihood has shape \(4, 1\); use y\[:, None\]$"),
        (regressor, 2, torch.zeros(4, 2, 1), r"targets have shape \(4, 2, 1\), .* has shape \(4, 2\); use y\.squeeze\(-1\)$"),
        (regressor, 2, torch.zeros(3, 2), r"\(3, 2\), .* has shape \(4, 2\); there are 3 targets for 4 examples$"),
        (regressor, 2, torch.zeros(4, 3), r"targets have shape \(4, 3\), but the likelihood has shape \(4, 2\)$"),
        (regressor, 2, torch.tensor(1.0), r"targets have shape \(\), but"),
        (regressor, 1, [[0.0]] * 4, "targets must be a tensor of real numbers, got a list"),
        (regressor, 1, torch.zeros(4, 1, dtype=torch.complex64), "real numbers, got torch.complex64"),
        (pl.BayesianClassifier, 3, ZEROS[:, None], r"targets have shape \(4, 1\), but .* has shape \(4,\); use y\.squeeze\(-1\)$"),
        (pl.BayesianClassifier, 3, torch.eye(3)[ZEROS], r"labels have shape \(4, 3\), like one-hot or .* use y\.argmax\(1\), of shape \(4,\)"),
        (pl.BayesianClassifier, 3, ZEROS.float(), r"labels must be integers .* got torch.float32; use y\.long\(\)"),
        (pl.BayesianClassifier, 3, ZEROS[:3], r"\(3,\), but the likelihood has shape \(4,\); there are 3 targets for 4 examples"),
        (pl.BayesianClassifier, 1, ZEROS, r"logits \[n, classes\] with at least two classes, got \(4, 1\)"),
        (Labels, 3, ZEROS, r"targets have shape \(4,\), but the likelihood has shape \(4, 3\)"),
        (PerElement, 3, torch.zeros(4, 3), r"the batch shape \(4, 3\), so every element would count as an example; append \.to_event\(1\)"),
        (OneForAll, 3, torch.zeros(4), r"batch shape \(\) for 4 examples with outputs of shape \(4, 3\); it must be \(4,\)"),
        (OfTorch, 1, torch.zeros(4), "must return a distribution from pyro.distributions, got a Normal from torch"),
    ],
)  # fmt: skip
def test_targets_that_the_likelihood_would_broadcast_are_refused(make, outputs, y, message):
    model = make(nn.Linear(2, outputs), num_data=9)
    guide, x = pl.guides.deterministic(model), torch.randn(4, 2)
    for loss in (pl.ELBO().loss, pl.ELBO().terms, lambda model, guide, x, y: model(x, y)):
        with pytest.raises(pl.UserError, match=message) as raised:
            loss(model, guide, x, y)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_targets_of_any_integer_dtype_count_alike(dtype):
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    for make, outputs, right in (
        (pl.BayesianClassifier, 2, y),
        (Labels, 2, torch.stack([y, 1 - y], 1).float()),
        (regressor, 1, y[:, None].float()),
    ):
        model = make(nn.Linear(2, outputs), num_data=4)
        guide = pl.guides.deterministic(model)
        expected, found = (pl.ELBO().terms(model, guide, x, target) for target in (right, right.to(dtype)))
        assert torch.equal(found.nll, expected.nll)
        assert torch.equal(model.tally(found.output, right.to(dtype)), model.tally(expected.output, right))


def test_several_labels_count_as_their_cross_entropies():
    model = Labels(nn.Linear(2, 3), num_data=10)
    guide, x = pl.guides.deterministic(model), torch.randn(5, 2)
    y = torch.rand(5, 3) < 0.5
    terms = pl.ELBO().terms(model, guide, x, y)
    expected = 2 * F.binary_cross_entropy_with_logits(terms.output, y.float(), reduction="sum")
    torch.testing.assert_close(terms.nll, expected)
    torch.testing.assert_close(
        model.tally(terms.output, y), (terms.output.sigmoid() - y.float()).square().mean(1).sum()
    )


def test_num_data_is_a_whole_number_of_no_fewer_examples_than_a_batch():
    for wrong in (0, -1, 0.5, 1.5, float("nan"), float("inf"), "60", True, None):
        with pytest.raises(pl.UserError, match="num_data must be a whole number of examples, at least 1"):
            pl.BayesianClassifier(nn.Linear(2, 2), num_data=wrong)
    model = pl.BayesianClassifier(nn.Linear(2, 2), num_data=5e4)
    assert repr(model.num_data) == "50000"
    model.num_data = 3
    with pytest.raises(pl.UserError, match="a batch has 4 examples, but num_data is 3"):
        model(torch.randn(4, 2), ZEROS)
    assert model(torch.randn(4, 2)).shape == (4, 2), "without targets nothing is counted"
