import abc
import copy
import pickle
from typing import Protocol

import pytest
import timm
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from pyro_lottery.model import prunable_sites, random_parameters
from tests.support import TinyNet, tiny


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
    (terms.nll + terms.tempered_kl).backward()
    assert all((g != 0).any() for g in guide.unpack(guide.loc.grad).values())


def test_a_model_is_sampled_without_data_and_batchnorm_does_not_notice(tiny_model):
    before = tiny_model.net_state()
    trace = poutine.trace(tiny_model).get_trace()
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == list(tiny_model.sites)
    assert all(torch.equal(before[n], t) for n, t in tiny_model.net_state().items())
    assert set(before) == {f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def test_two_networks_with_the_same_names_share_nothing(tiny_data):
    def trained(pair):
        return pl.posterior(pair[1]).loc["conv.weight"]

    options = {"epochs": 1, "train_samples": 1}
    alone = []
    for seed in (1, 2):
        pair = tiny(seed=seed)
        for level in (0, 1):
            pl.train(*pair, tiny_data, level=level, **options)
        alone.append(trained(pair))
    together = [tiny(seed=1), tiny(seed=2)]
    for level in (0, 1):
        for pair in together:
            pl.train(*pair, tiny_data, level=level, **options)
    assert all(torch.equal(a, trained(b)) for a, b in zip(alone, together, strict=True))


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


def test_both_heads_of_a_distilled_transformer_are_spared():
    net = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=16, num_classes=5)
    prunable = prunable_sites(net)
    assert "blocks.0.attn.qkv.weight" in prunable
    assert not {"head.weight", "head_dist.weight"} & set(prunable)


def test_gains_of_standardised_convolutions_stay_deterministic():
    names = {name for _, _, name in random_parameters(timm.create_model("nf_resnet26"))}
    assert names == {"weight", "bias"}


def test_layers_that_would_be_left_out_are_named():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(pl.UserError, match=r"'0\.weight' and '1\.weight' are one tied parameter"):
        pl.BayesianClassifier(tied, num_data=1)
    for change in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = TinyNet()
        change(net.hidden)
        with pytest.raises(pl.UserError, match=r"'hidden\.weight' is not a parameter"):
            pl.BayesianClassifier(net, num_data=1)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    nn.utils.parametrize.register_parametrization(attention[0], "in_proj_weight", nn.Identity())
    with pytest.raises(pl.UserError, match=r"'0\.in_proj_weight' is not a parameter"):
        pl.BayesianClassifier(attention, num_data=1)
    net = TinyNet()
    net.hidden.weight_init = "xavier"
    with pytest.raises(pl.UserError, match=r"the layer of 'hidden\.weight' has an attribute 'weight_init'.* rename it"):
        pl.BayesianClassifier(net, num_data=1)
    del net.hidden.weight_init
    with pytest.raises(pl.UserError, match="kl_temperature must be greater than 0"):
        pl.BayesianClassifier(net, num_data=1, kl_temperature=-1.0)
    pl.BayesianClassifier(net, num_data=1)  # which both left as it was
    with pytest.raises(pl.UserError, match="is already Bayesian"):
        pl.BayesianClassifier(net, num_data=1)


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
    torch.testing.assert_close(
        terms.tempered_kl.detach(), sum(torch.distributions.kl_divergence(q, prior).sum() for q in each)
    )


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x):
        """Its outputs."""


class Named(Protocol):
    name: str


class Concrete(Abstract, Named):
    def __init__(self):
        super().__init__()
        self.inner, self.out, self.name = Inner(), nn.Linear(6, 3), "concrete"

    def forward(self, x):
        return self.out(self.inner(x).relu())


class Inner(Abstract):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x)


def test_classes_with_a_metaclass_of_their_own(monkeypatch):
    model, x = pl.BayesianClassifier(Concrete(), num_data=9), torch.randn(5, 4)
    assert set(model.sites) == {"inner.layer.weight", "inner.layer.bias", "out.weight", "out.bias"}
    assert isinstance(model.net, Concrete)
    guide = pl.guides.mean_field(model)
    expected = pl.predict_mean(model, guide, x)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again.net) is type(model.net)
        assert torch.equal(pl.predict_mean(again, guide, x), expected)
    with pytest.raises(TypeError, match="abstract"):
        Abstract()
    saved = pickle.dumps(model)
    monkeypatch.setattr(type(PyroModule), "_pyro_mixin_cache", {})  # as in another process
    assert torch.equal(pl.predict_mean(pickle.loads(saved), guide, x), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_part_is_refused_by_name():
    with pytest.raises(pl.UserError, match="'1' is a ScriptModule, which cannot be part of a Pyro module"):
        pl.BayesianClassifier(nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.ReLU()), nn.Linear(3, 3)), num_data=9)


def test_complex_parameters_are_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].scale = nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    with pytest.raises(pl.UserError, match=r"'0.scale' is torch.complex64, which is not trained here; hold real and"):
        pl.BayesianClassifier(net, num_data=9)
    net[0].scale.requires_grad_(False)
    pl.BayesianClassifier(net, num_data=9)
