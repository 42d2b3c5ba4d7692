import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from pyro_lottery import kernels
from tests.support import TinyNet, tiny


def test_likelihood_counts_every_example_once_and_the_kl_once(tiny_model, tiny_data):
    # With fixed parameters and BatchNorm in eval mode, the epoch's mean loss does not depend
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
    with pytest.raises(pl.UserError, match="it needs a Linear, Conv"):
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

    for prior, make in ((None, pl.guides.mean_field), (pl.priors.flat(), pl.guides.deterministic)):
        with FakeTensorMode(), pyro.validation_enabled(False), kernels.using("torch"):
            with torch.device("cuda"):
                net = TinyNet()
            model = pl.BayesianClassifier(net, prior, num_data=4)
            guide = make(model)
            x, y = torch.zeros(4, 1, 4, 4, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            terms = pl.ELBO().terms(model, guide, x, y)  # a fake tensor has no value: any .item() would raise
            assert (terms.nll + terms.tempered_kl).device.type == "cuda"


def test_a_ticket_drops_into_a_fresh_network_and_says_what_differs(tmp_path):
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
        assert {t.dtype for t in (terms.nll, terms.tempered_kl, terms.output, guide.loc)} == {torch.double}
        m, s = guide.loc.item(), guide.log_scale.exp().item()
        assert terms.tempered_kl.item() == pytest.approx((m**2 + s**2 - 1) / 2 - math.log(s), rel=1e-14)
        normal = torch.distributions.Normal(terms.output.detach(), 0.5)
        assert terms.nll.item() == pytest.approx(-normal.log_prob(y).sum().item(), rel=1e-14)
    w = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace())).get_trace(x).nodes
    assert torch.equal(w["_RETURN"]["value"], x.double() * w["weight"]["value"])
    assert pl.prediction.logits_mean(model, guide, x).flatten().tolist() == [0.1, 0.2, -0.1]
    assert poutine.trace(model).get_trace(x).nodes["weight"]["value"].dtype == torch.double, "priors too"


def test_a_classifier_in_float64_trains_prunes_and_is_saved(tiny_data, tmp_path):
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


def test_num_data_is_a_whole_number_of_no_fewer_examples_than_a_batch():
    for wrong in (0, -1, 0.5, 1.5, float("nan"), float("inf"), "60", True, None):
        with pytest.raises(pl.UserError, match="num_data must be a whole number of examples, at least 1"):
            pl.BayesianClassifier(nn.Linear(2, 2), num_data=wrong)
    model = pl.BayesianClassifier(nn.Linear(2, 2), num_data=5e4)
    assert repr(model.num_data) == "50000"
    model.num_data = 3
    with pytest.raises(pl.UserError, match="a batch has 4 examples, but num_data is 3"):
        model(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    assert model(torch.randn(4, 2)).shape == (4, 2), "without targets nothing is counted"


def test_given_weights_are_used_without_asking_pyro_and_are_gone_afterwards():
    model, guide = tiny()
    x = torch.randn(5, 1, 4, 4)
    model.eval()
    with torch.no_grad():
        mask = {"conv.weight": torch.rand(model.initial_values()["conv.weight"].shape) < 0.5}
        drawn = guide()
        with pl.handlers.sparsify(mask), pyro.condition(data=drawn):
            expected, used = model.outputs(x), model.sampled()
        assert not used["conv.weight"][~mask["conv.weight"]].any()
        assert torch.equal(used["out.weight"], drawn["out.weight"])
        with model.with_weights({"out.bias": torch.ones(3)}):
            with model.with_weights(used):
                assert torch.equal(model.outputs(x), expected)
            assert torch.equal(model.net.out.bias, torch.ones(3)), "the outer ones are back"
        with model.with_weights(used), pyro.poutine.trace() as traced:
            assert torch.equal(model.outputs(x), expected)
        assert not [name for name, node in traced.trace.nodes.items() if node["type"] == "sample"]
        assert not torch.equal(model.outputs(x), model.outputs(x))  # the prior's weights again
        with pytest.raises(ZeroDivisionError), model.with_weights(used):
            raise ZeroDivisionError
        assert "weight" not in vars(model.net.conv)
