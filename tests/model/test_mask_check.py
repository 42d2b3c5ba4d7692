"""Pruned weights are 0 in what layers compute with, counted there, or the layer is named."""

import copy
import warnings

import pytest
import timm
import torch
from pyro import poutine
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from pyro_lottery import prediction
from pyro_lottery.model.mask_check import check_used_weights, used_weights
from tests.support import TinyNet

QUICK = {"epochs": 1, "batch_size": 16, "milestones": ()}


def standardise(weight):
    """Weight standardisation (Qiao et al. 2019), written anew."""
    flat = weight.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-6).sqrt()).view_as(weight)


class Standardised(nn.Conv2d):
    def __init__(self, *args, gain=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return F.conv2d(x, weight=self.gain * standardise(self.weight), bias=self.bias, padding=self.padding)


class StandardisedNet(TinyNet):
    def __init__(self, gain=1.0):
        super().__init__()
        self.conv = Standardised(1, 4, 3, padding=1, gain=gain)


def pruned(model, density):
    posterior = pl.posterior(pl.guides.mean_field(model))
    return pl.masks.shrink(pl.masks.full(posterior), pl.scores.magnitude(posterior), round(1 - density, 6)), posterior


def share_in_use(model, density, images):
    """Of the prunable weights that layers get, the share that is not 0."""
    mask, posterior = pruned(model, density)
    with pl.handlers.sparsify(mask):
        check_used_weights(model, images)
        uses = used_weights(model, pl.masks.apply(mask, posterior).loc, images)
    uses = [use for use in uses if set(use.sites) <= set(model.prunable)]
    return sum(use.nonzero for use in uses) / sum(use.elements for use in uses)


def test_a_standardised_convolution_computes_with_mask_times_standardised_weight(half_mask, tiny_data):
    model = pl.BayesianClassifier(StandardisedNet(), num_data=60)
    half_mask = half_mask | {"conv.weight": torch.arange(36).view(4, 1, 3, 3) % 2 == 0}
    loc, x = pl.masks.apply(half_mask, pl.posterior(pl.guides.mean_field(model))).loc, tiny_data.test[:5]
    expected = F.conv2d(x, standardise(loc["conv.weight"]) * half_mask["conv.weight"], loc["conv.bias"], padding=1)
    dense = F.conv2d(x, standardise(loc["conv.weight"]), loc["conv.bias"], padding=1)
    for each in (model, copy.deepcopy(model)):
        seen = []
        each.net.bn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        guide = pl.guides.mean_field(each)
        with pl.handlers.sparsify(half_mask):
            pl.guides.zero_pruned_(guide, half_mask)
            pl.predict_mean(each, guide, x)
        torch.testing.assert_close(seen.pop(), expected)
        pl.predict_mean(each, guide, x)
        torch.testing.assert_close(seen.pop(), dense)


@pytest.mark.filterwarnings("ignore:local reparameterization")
@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_under_a_mask_is_that_of_what_a_standardised_convolution_computes(estimator, tiny_data, half_mask):
    half_mask = half_mask | {"conv.weight": torch.arange(36).view(4, 1, 3, 3) % 2 == 0}

    class ByHand(TinyNet):
        """The same network with its mask written into it."""

        def forward(self, x):
            x = F.conv2d(x, standardise(self.conv.weight) * half_mask["conv.weight"], self.conv.bias, padding=1)
            x = F.avg_pool2d(torch.relu(self.bn(x)), 2).flatten(1)
            return self.out(torch.relu(self.hidden(x)))

    start, gradients = TinyNet().state_dict(), []
    for net in (StandardisedNet(), ByHand()):
        net.load_state_dict(start, strict=False)
        model = pl.BayesianClassifier(net, num_data=60)
        guide = pl.guides.mean_field(model)
        torch.manual_seed(1)
        with pl.handlers.sparsify(half_mask):
            terms = pl.ELBO(estimator=estimator).terms(model, guide, tiny_data.test[:8], tiny_data.test.labels[:8])
            (terms.nll + terms.tempered_kl).backward()
        gradients.append(guide.unpack(guide.loc.grad))
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])
        assert (value[~half_mask.get(name, torch.ones_like(value) > 0)] == 0).all()


@pytest.mark.parametrize("gain", [1.0, 0.0])  # 0 at the start, as of timm's nfnets, must not hide what the layer does
def test_a_standardised_network_is_trained_under_a_mask(gain, tiny_data, half_mask):
    model = pl.BayesianClassifier(StandardisedNet(gain), num_data=60)
    guide = pl.guides.mean_field(model)
    for _ in range(2):
        with pl.handlers.sparsify(half_mask):
            history = pl.train(model, guide, tiny_data, **QUICK | {"epochs": 20, "lr": 0.02, "seed": 1})
    assert history[-1]["test_accuracy"] > 0.9
    assert share_in_use(model, 0.1, tiny_data.test[:2]) < 0.11


class Shifted(TinyNet):
    """A network that takes a layer's weight out of its hands."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        return self.out(torch.relu(F.linear(x, self.hidden.weight - self.hidden.weight.mean(), self.hidden.bias)))


class Multiplied(TinyNet):
    """A network that does without layer functions."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        return self.out(torch.relu(x @ (self.hidden.weight + 1).T + self.hidden.bias))


class Halved(TinyNet):
    """The same of half a weight, of which fewer elements are in use than survive."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        first, rest = self.hidden.weight.split((2, 4))
        x = torch.cat([F.linear(x, first + 0.1), F.linear(x, rest)], -1)
        return self.out(torch.relu(x + self.hidden.bias))


class Fine(TinyNet):
    """Scales, transposes and splits weights, and filters the image with what it computed: none of it undoes a mask."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        a, b = (2 * self.hidden.weight).T.contiguous().T.split(3)
        x = torch.cat([F.linear(x, a), F.linear(x, b)], -1)
        x = F.conv1d(x[None], x.softmax(-1)[:, None, :1], groups=len(x))[0]
        made = F.linear(torch.ones(1, 16), self.hidden.weight).sigmoid()  # a weight that a layer puts out
        return self.out(torch.relu(F.linear(x, made.T @ made))) + torch.einsum("bi,oi->bo", x, self.out.weight)


class Auxiliary(TinyNet):
    """A head that runs in training alone, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.aux, self.unused = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        x = torch.relu(self.hidden(x))
        return self.out(x) + (0.3 * self.aux(x) if self.training else 0)


@pytest.mark.filterwarnings("ignore:'aux.weight' can be pruned, but a pass in evaluation mode does not use it")
def test_layers_that_the_check_does_not_meet_may_be_pruned(tiny_data):
    model = pl.BayesianClassifier(Auxiliary(), num_data=60)
    guide, mask = pl.guides.mean_field(model), pruned(model, 0.5)[0]
    assert {"aux.weight", "unused.weight"} & set(mask)
    with pl.handlers.sparsify(mask):
        pl.train(model, guide, tiny_data, **QUICK)
        pl.predict(model, guide, tiny_data.test, 2)
    loc = pl.posterior(guide).loc
    for name, m in mask.items():
        assert not loc[name][~m].any() or loc[name].ndim == 1


PRODUCTS = {
    "addbmm": lambda x, w: torch.zeros(len(x), len(w)).addbmm_(x[None], w.T[None]),
    "vecdot": lambda x, w: torch.linalg.vecdot(x[:, None], w[None]),
    "addmm_": lambda x, w: torch.zeros(len(x), len(w)).addmm_(x, w.T),
    "tensordot": lambda x, w: torch.tensordot(x, w, ([1], [1])),
    "inner": torch.inner,
    "mv": lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
    "addmv": lambda x, w: torch.stack([torch.zeros(len(w)).addmv(w, row) for row in x]),
    "dot": lambda x, w: torch.stack([torch.stack([row.dot(of_one) for of_one in w]) for row in x]),
    "linalg.matmul": lambda x, w: torch.linalg.matmul(x, w.T),
    "linalg.multi_dot": lambda x, w: torch.linalg.multi_dot([x, w.T, torch.eye(len(w))]),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_every_product_shows_the_weight_that_it_gets(product, tiny_data):
    class Shown(TinyNet):
        def forward(self, x):
            x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
            weight = self.hidden.weight + self.shift
            return self.out(torch.relu(product(x, weight) + self.hidden.bias))

    model = pl.BayesianClassifier(Shown(), num_data=60)
    with pl.handlers.sparsify(pruned(model, 0.5)[0]):
        model.net.shift = 0
        check_used_weights(model, tiny_data.test[:5])
        model.net.shift = 1
        with pytest.raises(pl.UserError, match=WARNED):
            check_used_weights(model, tiny_data.test[:5])


@pytest.mark.parametrize("make", [Shifted, Multiplied, Halved])
def test_a_weight_that_is_transformed_elsewhere_is_refused_by_name_before_the_first_step(make, tiny_data):
    model = pl.BayesianClassifier(make(), num_data=60)
    guide = pl.guides.mean_field(model)
    before = pl.posterior(guide).loc["out.weight"]
    with (
        pytest.raises(pl.UserError, match=r"^'hidden\.weight' is transformed before its layer uses it.*dense$"),
        pl.handlers.sparsify(pruned(model, 0.5)[0]),
    ):
        pl.train(model, guide, tiny_data, **QUICK)
    assert torch.equal(pl.posterior(guide).loc["out.weight"], before)
    pl.train(model, guide, tiny_data, **QUICK)  # dense
    with pl.handlers.sparsify(pl.masks.full(pl.posterior(guide))):
        pl.train(model, guide, tiny_data, **QUICK)


WARNED = r"^'hidden\.weight' is transformed before its layer uses it"


@pytest.mark.parametrize("predict", [pl.predict, pl.predict_mean, pl.predictive], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [Shifted, Multiplied, Halved])
def test_a_prediction_with_a_transformed_weight_is_warned_of(make, predict, tiny_data):
    model = pl.BayesianClassifier(make(), num_data=60)
    guide, x = pl.guides.mean_field(model), tiny_data.test[:5]
    half, full = pruned(model, 0.5)[0], pl.masks.full(pl.posterior(guide))
    none = full | {"hidden.weight": torch.zeros_like(full["hidden.weight"])}
    others = half | {"hidden.weight": full["hidden.weight"]}
    for harmless in (full, others, none):  # whose check shows nothing of the layer
        with pl.handlers.sparsify(harmless):
            predict(model, guide, x)
    with pl.handlers.sparsify(half), torch.inference_mode(), pytest.warns(UserWarning, match=WARNED):
        predict(model, guide, [x] if predict is pl.predict else x)
    with pl.handlers.sparsify(half):
        predict(model, guide, x)  # which is said once


class Made(TinyNet):
    """Makes a scale of the first batch that it gets, and takes no batch of another size."""

    scale = None

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        if self.scale is None:
            self.scale = x.detach().mean(0, keepdim=True).expand(len(x), -1)
        return self.out(torch.relu(self.hidden(x + self.scale)))


class Products(TinyNet):
    """Without layer functions, and with a product of activations."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        x = torch.relu(x @ self.hidden.weight.T + self.hidden.bias)
        return x @ (self.out.weight.T @ torch.eye(3)) + (x @ x.T).mean()


class Normed(TinyNet):
    """Divides filters by their norms, which is 0/0 where all weights of one are pruned."""

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        weight = self.hidden.weight / self.hidden.weight.norm(dim=1, keepdim=True)
        return self.out(torch.relu(F.linear(x, weight, self.hidden.bias)))


@pytest.mark.parametrize("make", [Fine, Made, Products, Normed])
def test_the_check_of_a_prediction_changes_nothing_of_it(make, tiny_data):
    found, x = [], tiny_data.test[:5]
    for checked in (True, False):
        torch.manual_seed(3)
        model = pl.BayesianClassifier(make(), num_data=60)
        guide, state = pl.guides.mean_field(model), model.net_state()
        with pl.handlers.sparsify(pruned(model, 0.5)[0]), pytest.MonkeyPatch.context() as patch:
            if not checked:
                patch.setattr(prediction, "warn_of_used_weights", lambda model, x: None)
            torch.manual_seed(4)
            found.append(pl.predict(model, guide, x, num_samples=3))
        assert all(torch.equal(state[name], value) for name, value in model.net_state().items())
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_an_enclosing_trace_does_not_see_the_check(tiny_data, half_mask, tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    with pl.handlers.sparsify(half_mask), poutine.trace() as trace:
        pl.predict_mean(tiny_model, guide, tiny_data.test[:5])
    assert set(tiny_model.initial_values()) <= set(trace.trace.nodes)


def test_a_prediction_checks_a_network_once(tiny_data, half_mask, tiny_model):
    passes, x = [], tiny_data.test[:5]
    tiny_model.net.register_forward_hook(lambda *_: passes.append(1))
    guide = pl.guides.mean_field(tiny_model)
    for _ in range(2):
        with pl.handlers.sparsify(half_mask):
            pl.predict(tiny_model, guide, x, num_samples=4)
    assert len(passes) == 1 + 4 + 4


class Pixels(nn.Module):
    """Integers in, and products instead of layers."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(x.float().flatten(1) / 255 @ self.hidden.weight.T + self.hidden.bias)
        return x @ self.out.weight.T + x.mean()


class Tokens(nn.Module):
    """Products of what was looked up, and of what attention put out."""

    def __init__(self):
        super().__init__()
        self.words, self.attend = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.query, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x):
        words = self.words(x.flatten(1).long() % 20)
        words = words + (words @ words.transpose(1, 2)).softmax(-1) @ words
        seen = self.attend(words, words, words)[0]
        shares = torch.einsum("btd,d->bt", seen, self.query).softmax(1)
        return self.out(torch.einsum("bt,btd->bd", shares, seen))


class ShiftedPixels(Pixels):
    def forward(self, x):
        x = torch.relu(x.float().flatten(1) / 255 @ (self.hidden.weight - self.hidden.weight.mean()).T)
        return x @ self.out.weight.T


@pytest.mark.filterwarnings("ignore:densities count only")
@pytest.mark.parametrize("make", [Pixels, Tokens])
def test_activations_of_integers_are_no_weights(make):
    model = pl.BayesianClassifier(make(), num_data=60)
    with pl.handlers.sparsify(pruned(model, 0.1)[0]):
        check_used_weights(model, torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8))


def test_a_weight_that_is_transformed_is_found_beside_integers():
    model = pl.BayesianClassifier(ShiftedPixels(), num_data=60)
    with pl.handlers.sparsify(pruned(model, 0.1)[0]), pytest.raises(pl.UserError, match=WARNED):
        check_used_weights(model, torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8))


@pytest.mark.parametrize("survivors", [1, 2, 4])
def test_a_layer_of_few_survivors_is_checked_too(survivors, tiny_data):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            weight = self.hidden.weight
            return self.out(torch.relu(F.linear(x.flatten(1), weight - weight.mean(1, keepdim=True))))

    model = pl.BayesianClassifier(Centred(), num_data=60)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask.view(-1)[torch.randperm(256)[:survivors]] = True
    with (
        pl.handlers.sparsify({"hidden.weight": mask}),
        pytest.raises(pl.UserError, match=r"'hidden\.weight' is transformed before"),
    ):
        check_used_weights(model, tiny_data.train[:2])


def test_what_leaves_pruned_weights_zero_is_not_refused_and_the_check_leaves_no_trace(tiny_data):
    model = pl.BayesianClassifier(Fine(), num_data=60)
    state, generator = model.net_state(), torch.get_rng_state()
    with pl.handlers.sparsify(pruned(model, 0.3)[0]):
        check_used_weights(model, tiny_data.train[:2])
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.net.training
    assert all(torch.equal(state[name], value) for name, value in model.net_state().items())
    assert not any(p.grad is not None for p in model.parameters())


def small_bit():
    return ResNetV2((1, 1), (8, 16), num_classes=3, stem_chs=8, conv_layer=StdConv2d, norm_layer=nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("make", "standardised"),
    [
        (small_bit, True),
        ("nf_regnet_b0", True),
        ("tf_mobilenetv3_small_075", False),  # whose convolutions pad by themselves
        ("mixnet_s", False),
        ("convit_tiny", False),
        ("efficientnet_cc_b0_4e", False),
    ],
)
def test_the_share_of_nonzeros_that_convolutions_of_timms_families_get(make, standardised):
    net = timm.create_model(make, num_classes=3) if isinstance(make, str) else make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "densities count only the prunable weights")
        model = pl.BayesianClassifier(net, num_data=60)
    size = 224 if make == "convit_tiny" else 64
    share = share_in_use(model, 0.02, torch.randn(2, 3, size, size))
    # Filters of one weight, or of weights that are all pruned or alike, are standardised to 0.
    assert 0.01 < share < 0.021 if standardised else share == pytest.approx(0.02, rel=1e-3)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.hidden, self.out = kind(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.hidden(self.rnn(x)[0]))


@pytest.mark.parametrize(
    ("make", "share", "layer"),
    [
        (lambda: Recurrent(nn.LSTM), r"13\.6%", r"'rnn\.weight_hh_l0' \(LSTM\) and 1 other"),
        (lambda: Recurrent(nn.GRU), r"17\.0%", r"'rnn\.weight_hh_l0' \(GRU\) and 1 other"),
        (
            lambda: timm.create_model("efficientnet_cc_b0_4e", num_classes=3),
            r"10\.7%",
            r"'blocks\.\d\.\d\.conv_pwl?\.weight' \(CondConv2d\)",
        ),
    ],
)
def test_a_network_much_of_which_cannot_be_random_is_told_what_a_density_is_of(make, share, layer):
    with pytest.warns(
        UserWarning, match=f"densities count only the prunable weights, {share} of this network's; {layer}"
    ):
        pl.BayesianClassifier(make(), num_data=60)


class Reversed(nn.Module):
    """Its layers are defined in another order than they are used."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(4, 8)

    def forward(self, x):
        return self.head(self.body(x).relu())


class Named(Reversed):
    def get_classifier(self):
        return self.head


def test_a_final_layer_that_is_not_defined_last(tmp_path):
    x = torch.randn(30, 4)
    data = pl.data.from_tensors(x, torch.arange(30) % 3, x, torch.arange(30) % 3, normalize=False)
    options = {"levels": 1, "epochs": 1, "milestones": (), "eval_samples": 2}
    with pytest.warns(UserWarning, match=r"'head\.weight' is used last and can be pruned"):
        run = pl.find_tickets(Reversed(), data, run_dir=tmp_path / "a", **options)
    assert list(run.level(1).mask) == ["head.weight"]
    named = pl.find_tickets(Named(), data, run_dir=tmp_path / "b", **options)
    assert list(named.level(1).mask) == ["body.weight"]
