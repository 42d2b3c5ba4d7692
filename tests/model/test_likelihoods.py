import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl


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
