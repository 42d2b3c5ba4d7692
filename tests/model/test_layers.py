import copy

import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_lottery as pl
from pyro_lottery import imp, nets, sites, tickets, transplant
from pyro_lottery.model import layers
from pyro_lottery.runs.config import Config
from tests.support import SMALL, TinyNet, small_run

LATE = {"conv1.*": None, "*": pl.priors.normal(1.0)}
"""A prior by import path, for LeNet."""


def test_what_a_prior_of_none_leaves_deterministic_is_trained_and_saved(tiny_data, tmp_path):
    model = pl.BayesianClassifier(TinyNet(), {"hidden.*": pl.priors.normal(1.0), "*": None}, num_data=60)
    guide = pl.guides.mean_field(model)
    assert model.sites == ("hidden.weight", "hidden.bias")
    assert model.prunable == ("hidden.weight",)
    before = model.net_state()
    assert {"conv.weight", "conv.bias", "out.weight", "out.bias"} < set(before)
    mask = {"hidden.weight": torch.arange(96).view(6, 16) % 2 == 0}
    with pl.handlers.sparsify(mask):
        pl.train(model, guide, tiny_data, epochs=1)
        torch.manual_seed(3)
        expected = pl.predict(model, guide, tiny_data.test, 2)
    after = model.net_state()
    assert all(bool((after[name] != before[name]).any()) for name in ("conv.weight", "out.weight", "out.bias"))

    tickets.rewind(mask, pl.posterior(guide), after).save(tmp_path / "ticket.safetensors")
    fresh = pl.BayesianClassifier(TinyNet(), {"hidden.*": pl.priors.normal(1.0), "*": None}, num_data=60)
    its_guide = pl.guides.mean_field(fresh)
    found = fresh.start_from_(its_guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    with pl.handlers.sparsify(found):
        torch.manual_seed(3)
        assert torch.equal(pl.predict(fresh, its_guide, tiny_data.test, 2), expected)


def test_a_bayesian_last_layer_is_the_linear_model_of_its_features():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    features = copy.deepcopy(net[:2])
    linear = copy.deepcopy(net[2])
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        inputs = features(x)
    whole = pl.BayesianRegressor(net, {"2.*": pl.priors.normal(1.0), "*": None}, num_data=5, noise_scale=0.3)
    last = pl.BayesianRegressor(linear, num_data=5, noise_scale=0.3)
    for estimator in ("weights", "local"):
        found = []
        for model, given in ((whole, x), (last, inputs)):
            torch.manual_seed(2)
            guide = pl.guides.mean_field(model, init_scale=0.5)
            terms = pl.ELBO(estimator=estimator).terms(model, guide, given, y)
            (terms.nll + terms.tempered_kl).backward()
            found.append((terms.nll, terms.tempered_kl, guide.loc.grad, guide.log_scale.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), estimator
    assert all(bool((p.grad != 0).any()) for p in whole.net[0].parameters())


@pytest.mark.parametrize("estimator", ["weights", "local"])
@pytest.mark.parametrize("random", ["weight", "bias"])
def test_a_layer_may_be_random_in_part(random, estimator):
    prior = {f"*{random}": pl.priors.normal(1.0), "*": None}
    model = pl.BayesianRegressor(nn.Linear(2, 1), prior, num_data=4000, noise_scale=1.0)
    guide, x = pl.guides.mean_field(model, init_scale=0.5), torch.tensor([[0.5, -2.0]]).expand(4000, 2)
    with torch.no_grad():
        draws = torch.stack(
            [pl.ELBO(estimator=estimator).terms(model, guide, x, torch.zeros(4000, 1)).output[0, 0] for _ in range(400)]
        )
    scale = 0.5 * (0.25 + 4) ** 0.5 if random == "weight" else 0.5  # the Kaiming scale of two inputs is 1
    assert draws.mean().item() == pytest.approx(pl.prediction.logits_mean(model, guide, x[:1]).item(), abs=0.2)
    assert draws.std().item() == pytest.approx(scale, rel=0.15)


def test_frozen_parameters_stay_as_they_are(tiny_data):
    net = TinyNet()
    net.conv.requires_grad_(False)
    net.bn.bias.requires_grad_(False)
    model = pl.BayesianClassifier(net, num_data=60)
    assert model.sites == ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    assert model.prunable == ("hidden.weight",)
    guide, before = pl.guides.mean_field(model), model.net_state()
    state = pl.TrainState()
    for _ in range(2):
        pl.train(model, guide, tiny_data, epochs=1, state=state)
    changed = {name for name, value in model.net_state().items() if not torch.equal(value, before[name])}
    assert changed == {"bn.weight", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    rows = {row["name"]: row for row in sites.deterministic(model)}
    assert {name: row["trained"] for name, row in rows.items()} == {
        "conv.weight": False, "conv.bias": False, "bn.weight": True, "bn.bias": False
    }  # fmt: skip
    assert (rows["conv.weight"]["layer"], rows["conv.weight"]["shape"]) == ("Conv2d", (4, 1, 3, 3))


def test_a_prior_that_leaves_nothing_random_is_refused():
    with pytest.raises(pl.UserError, match="the prior is None for every parameter"):
        pl.BayesianClassifier(TinyNet(), {"*": None}, num_data=60)
    with pytest.raises(pl.UserError, match=r"'conv\.weight' has a prior but is frozen"):
        pl.BayesianClassifier(TinyNet().requires_grad_(False), num_data=60)
    half = TinyNet()
    half.hidden.requires_grad_(False)
    with pytest.raises(pl.UserError, match=r"'hidden\.weight' has a prior but is frozen"):
        pl.BayesianClassifier(half, {"hidden.*": pl.priors.normal(1.0), "*": pl.priors.laplace(1.0)}, num_data=60)


def test_priors_are_replaced_where_there_are_some():
    prior = {"out.*": pl.priors.normal(1.0), "*": None}
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60)
    model.set_prior_(prior | {"out.*": pl.priors.normal(3.0)})
    assert float(model.prior_of("out.weight").scale) == 3
    model.set_prior_(pl.priors.normal(2.0))
    assert float(model.prior_of("out.bias").scale) == 2
    with pytest.raises(pl.UserError, match=r"'conv\.weight' is deterministic in this model"):
        model.set_prior_({"*": pl.priors.normal(1.0)})
    with pytest.raises(pl.UserError, match=r"'out\.weight' is random in this model"):
        model.set_prior_({"out.bias": pl.priors.normal(1.0), "*": None})


def test_layers_left_out_may_be_of_any_kind():
    net = TinyNet()
    nn.utils.parametrizations.weight_norm(net.hidden)
    with pytest.warns(UserWarning, match="densities count only the prunable weights"):
        model = pl.BayesianClassifier(net, {"hidden.*": None, "*": pl.priors.normal(1.0)}, num_data=60)
    assert "hidden.weight" not in model.sites
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    model = pl.BayesianClassifier(tied, {"2.*": pl.priors.normal(1.0), "*": None}, num_data=60)
    assert model.net[0].weight is model.net[1].weight


def test_a_partly_bayesian_network_in_a_run_folder(tmp_path):
    options = SMALL | {"prior": "tests.model.test_layers.LATE", "run_dir": str(tmp_path / "run")}
    run = imp.run_imp(Config(**options))
    level = run.level(1)
    assert not {"conv1.weight", "conv1.bias"} & {*level.posterior.loc, *level.ticket.mask}
    assert {"conv1.weight", "conv1.bias"} <= {*level.ticket.net}
    total = sum(mask.numel() for mask in level.ticket.mask.values())
    assert run.results["total"].tolist() == [total] * 3
    images = run.load_data().test
    one, other = (level.load_model() for _ in range(2))
    assert torch.equal(one.predict(images, 2), other.predict(images, 2))
    assert imp.run_imp(Config(**options)).results.equals(run.results), "a finished run is left as it is"


def test_a_deterministic_ticket_into_a_partly_bayesian_network(tmp_path):
    run = small_run(tmp_path / "run", guide="deterministic")
    dense, pruned = (run.level(level).ticket for level in (0, 1))
    found = transplant.transplant_run(run, [0], prior="tests.model.test_layers.LATE").level(0).ticket
    assert torch.equal(found.net["conv1.weight"], dense.start.loc["conv1.weight"])
    assert torch.equal(found.start.loc["conv2.weight"], dense.start.loc["conv2.weight"])
    assert not pruned.mask["conv1.weight"].all()
    with pytest.raises(pl.UserError, match=r"the mask prunes 'conv1\.weight', which stays deterministic"):
        transplant.transplant_run(run, [1], prior="tests.model.test_layers.LATE", run_dir=str(tmp_path / "other"))


def test_networks_that_are_not_ready_are_refused():
    with pytest.raises(pl.UserError, match=r"'0\.weight' has no shape yet"):
        pl.BayesianClassifier(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), num_data=1)
    compiled = torch.compile(TinyNet(), backend="eager")
    with pytest.raises(pl.UserError, match="the network is compiled"):
        pl.BayesianClassifier(compiled, num_data=1)
    with pytest.raises(pl.UserError, match="0 is compiled"):
        pl.BayesianClassifier(nn.Sequential(compiled), num_data=1)
    assert pl.BayesianClassifier(compiled._orig_mod, num_data=1).sites[0] == "conv.weight"
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(pl.UserError, match=rf"'conv\.weight' is {dtype}, .* net\.float\(\)"):
            pl.BayesianClassifier(TinyNet().to(dtype), num_data=1)
    mixed = TinyNet()
    mixed.out.double()
    with pytest.raises(pl.UserError, match=r"'conv\.weight' is torch\.float32 but 'out\.weight' is torch\.float64"):
        pl.BayesianClassifier(mixed, num_data=1)


class Twice(nn.Module):
    """A convolution and a BatchNorm that are in the network under two names each, for [n, 1, 8, 8] images."""

    def __init__(self, classes=10):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.one = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.two = nn.Sequential(self.one[0], nn.ReLU(), self.one[1])
        self.again = self.one
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.again(self.two(self.one(self.first(x)))).mean((2, 3)))


def test_a_module_in_two_places_is_one_site_with_its_own_value(tiny_data):
    net = Twice(3)
    plain = copy.deepcopy(net).eval()
    model = pl.BayesianClassifier(net, num_data=60)
    guide, x = pl.guides.mean_field(model), torch.randn(5, 1, 8, 8)
    assert model.sites == ("first.weight", "first.bias", "one.0.weight", "one.0.bias", "head.weight", "head.bias")
    assert set(model.net_state()) == {
        f"one.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    with torch.no_grad():
        torch.testing.assert_close(pl.prediction.logits_mean(model, guide, x), plain(x))
    model.eval()
    trace = poutine.trace(guide).get_trace()
    drawn = poutine.trace(poutine.replay(model, trace)).get_trace(x, torch.zeros(5, dtype=torch.long))
    values = {site: trace.nodes[site]["value"] for site in model.sites}
    names = layers.second_names(plain)
    assert {n: f for n, f in names.items() if f == "one.0.weight"} == {
        "two.0.weight": "one.0.weight", "again.0.weight": "one.0.weight"
    }  # fmt: skip
    expected = torch.func.functional_call(plain, values, (x,))  # which sets shared parameters under all their names
    torch.testing.assert_close(drawn.nodes["_RETURN"]["value"], expected)
    state = model.net_state()
    state["one.1.weight"] = torch.full((4,), 7.0)
    model.load_net_state(state)
    assert bool((model.net.two[2].weight == 7).all())


def test_a_module_in_two_places_in_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(nets._NETS, "twice", lambda classes, *size: Twice(classes))
    options = SMALL | {"arch": "twice", "levels": 1, "epochs": 1}
    run = imp.run_imp(Config(**options | {"run_dir": str(tmp_path / "run")}))
    assert list(run.level(1).ticket.mask) == ["first.weight", "one.0.weight"]
    images = run.load_data().test
    found = run.level(1).load_model().predict(images, 2)
    assert torch.equal(found, run.level(1).load_model().predict(images, 2))
    torch.manual_seed(5)
    plain = Twice()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    config = Config(**options | {"levels": 0, "run_dir": str(tmp_path / "transplant")})
    ticket = transplant.transplant_file(tmp_path / "plain.pt", None, config).level(0).ticket
    assert torch.equal(ticket.start.loc["one.0.weight"], plain.two[0].weight)


def test_parameters_tied_across_kinds_of_layers_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.hidden = nn.Linear(4, 4)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(self.hidden(self.embedding(x)).mean(1))

    with pytest.raises(pl.UserError, match=r"'embedding\.weight' and 'decoder\.weight' are one tied parameter"):
        pl.BayesianClassifier(Tied(), num_data=1)
    with pytest.warns(UserWarning, match="'embedding.weight' .Embedding. and 0 other parameters"):
        model = pl.BayesianClassifier(Tied(), {"decoder.*": None, "*": pl.priors.normal(1.0)}, num_data=1)
    assert model.net.decoder.weight is model.net.embedding.weight
    assert model.sites == ("hidden.weight", "hidden.bias")
