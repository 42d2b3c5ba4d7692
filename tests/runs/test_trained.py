import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.model.fixed import plain
from pyro_lottery.runs.trained import TrainedNetwork
from tests.support import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", levels=1, test_size=80)


@pytest.fixture(scope="module")
def images(run):
    return run.load_data().test[:]


def test_a_plain_module_predicts_with_the_mean_weights(run, images):
    network = run.level(1).load_model()
    module = network.as_module()
    assert type(module) is type(pl.create_model("lenet", 10, 1, 8))
    assert {type(m) for m in module.modules()} <= {type(m) for m in pl.create_model("lenet", 10, 1, 8).modules()}
    assert module.state_dict().keys() == pl.create_model("lenet", 10, 1, 8).state_dict().keys()
    torch.testing.assert_close(module(images).softmax(1), network.predict_mean(images), rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(network.predict_mean(images), run.level(1).load_model().predict_mean(images))


def test_an_ensemble_has_the_draws_of_predictions(run, images):
    network = run.level(1).load_model()
    module = network.as_module(samples=3, seed=5)
    every = module(images).softmax(1).view(3, len(images), 10)
    torch.testing.assert_close(every, network.predict(images, 3, seed=5, aggregate=False), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_metrics_of_torch_uncertainty_agree_with_ours(run, images):
    metrics = pytest.importorskip("torch_uncertainty.metrics")
    network, labels = run.level(1).load_model(), run.load_data().test.labels
    probs = network.as_module(samples=4)(images).softmax(1).view(4, len(images), 10).transpose(0, 1)
    found = network.predictive(images, 4)
    information = metrics.MutualInformation(reduction="none")
    information.update(probs)
    torch.testing.assert_close(information.compute().double(), found.epistemic, rtol=0, atol=1e-5)
    nll = metrics.CategoricalNLL()
    nll.update(probs.mean(1), labels)
    assert float(nll.compute()) == pytest.approx(pl.metrics.nll(found.probs, labels), abs=1e-5)
    brier = metrics.BrierScore(num_classes=10)
    brier.update(probs.mean(1), labels)
    assert float(brier.compute()) == pytest.approx(pl.metrics.brier(found.probs, labels), abs=1e-5)
    adaptive = metrics.classification.AdaptiveCalibrationError(task="multiclass", num_classes=10, num_bins=20)
    adaptive.update(probs.mean(1), labels)
    assert float(adaptive.compute()) == pytest.approx(pl.metrics.adaptive_ece(found.probs, labels), abs=1e-5)
    areas, (confidence, predicted) = metrics.AUGRC(), found.probs.max(1)
    areas.update(probs.mean(1), labels)  # by trapezoids, which differ from sums by about 1/n
    assert float(areas.compute()) == pytest.approx(
        pl.metrics.augrc(confidence, predicted == labels), abs=2 / len(labels)
    )


@pytest.mark.filterwarnings("ignore")
def test_laplace_starts_from_the_mean_weights(run, images):
    laplace = pytest.importorskip("laplace")
    network, labels = run.level(1).load_model(), run.load_data().test.labels
    module = network.as_module()
    found = laplace.Laplace(module, "classification", subset_of_weights="last_layer", hessian_structure="diag")
    data = torch.utils.data.TensorDataset(images, labels)
    found.fit(torch.utils.data.DataLoader(data, batch_size=40))
    probs = found(images, link_approx="probit")
    assert probs.shape == (len(images), 10)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(images)))
    agrees = probs.argmax(1) == network.predict_mean(images).argmax(1)
    assert float(agrees.float().mean()) > 0.9


def test_a_layer_that_transforms_its_weight_keeps_its_mask():
    class Standardised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    model = pl.BayesianClassifier(nn.Sequential(Standardised(6, 5), nn.Linear(5, 3)), num_data=5)
    guide = pl.guides.mean_field(model)
    mask = {"0.weight": torch.rand(5, 6) < 0.5}
    x = torch.randn(4, 6)
    with pl.handlers.sparsify(mask):
        expected = pl.predict_mean(model, guide, x)
        weights = pl.prediction.mean_weights(model, guide)
    torch.testing.assert_close(plain(model.net, weights, mask)(x).softmax(1), expected)


def test_an_ensemble_takes_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.out(self.layer(a) + b)

    model = pl.BayesianClassifier(Two(), num_data=9)
    network = TrainedNetwork(model, pl.guides.mean_field(model), {}, 0, "32", "off")
    a, b = torch.randn(5, 3), torch.randn(5, 4)
    one, other = network.as_module(2).networks
    assert torch.equal(network.as_module(2)(a, b=b), torch.cat([one(a, b), other(a, b)]))
