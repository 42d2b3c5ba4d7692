import pytest
import torch

import pyro_lottery as pl
from pyro_lottery.training.epoch import training_mode
from tests.support import QUICK, TinyNet


def test_ten_samples_move_batchnorm_as_far_as_one(tiny_data):
    # A point model, so that all passes see the same activations: m_10 passes of one batch must equal one pass.
    means = []
    for samples in (1, 10):
        torch.manual_seed(0)
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        with training_mode(model, samples):
            guide = pl.guides.deterministic(model)
            for _ in range(samples):
                pl.ELBO().terms(model, guide, tiny_data.train[:16], tiny_data.train.labels[:16])
        assert model.net.bn.momentum == 0.1
        means.append(model.net.bn.running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("whole", [False, True])
def test_a_batchnorm_in_eval_mode_stays_there_and_a_network_in_eval_mode_is_trained(tiny_data, whole):
    net = TinyNet()
    (net if whole else net.bn).eval()
    model = pl.BayesianClassifier(net, num_data=60)
    seen = []

    def look(_, given):
        if len(given[0]) > 2:  # of batches: before, two examples are tried out
            seen.append((net.training, net.bn.training))

    net.register_forward_pre_hook(look)
    pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)
    assert seen[0] == (True, whole)
    assert torch.equal(net.bn.running_mean, torch.zeros(4)) != whole
    assert net.bn.training == whole
