from dataclasses import replace

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import training
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.training import TrainState
from pyro_lottery.training.epoch import training_mode
from tests.support import QUICK, TinyNet, tiny


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


class Rank(Ranks):
    """One of several ranks, as far as an epoch's batches are concerned."""

    def __init__(self, rank, parallel):
        self.rank, self.world, self.parallel = rank, 2, parallel


def test_a_rank_of_weight_samples_augments_the_images_of_all_for_itself(tiny_data):
    data, (model, _) = replace(tiny_data, augment="crop_flip"), tiny()

    def batch(rank, parallel):
        who = Rank(rank, parallel) if parallel else ALONE
        with training.epoch(model, data, TrainState(), batch_size=16, ranks=who) as batches:
            return batches.batch(0)

    alone = batch(0, None)
    for same in (batch(0, "samples"), batch(0, "data"), batch(1, "data")):
        assert torch.equal(same[0], alone[0])
    own, again = batch(1, "samples"), batch(1, "samples")
    assert torch.equal(own[1], alone[1]), "the same images"
    assert torch.equal(own[0], again[0])
    assert not torch.equal(own[0], alone[0])
    assert not torch.equal(own[0], batch(2, "samples")[0])
    # each image is as it was or flipped
    flipped = torch.stack([own[0], own[0].flip(-1)])
    assert (flipped == alone[0]).flatten(2).all(2).any(0).all()
