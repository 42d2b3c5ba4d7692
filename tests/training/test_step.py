import pyro
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import seeds, training
from pyro_lottery.data import Epoch
from pyro_lottery.training.epoch import training_mode
from tests.support import QUICK, TinyNet, tiny


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimator", ["weights", "local"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_never_waits_for_the_gpu(tiny_data, estimator, masked):
    model = pl.BayesianClassifier(TinyNet().cuda(), num_data=60)
    guide = pl.guides.mean_field(model)
    mask = {s: torch.rand(v.shape, device="cuda") < 0.5 for s, v in model.initial_values().items()} if masked else {}
    optimizer = torch.optim.Adam(pl.guides.parameter_groups(model, guide, 1e-4), fused=True)
    x, y = tiny_data.test[:8].cuda(), tiny_data.test.labels[:8].cuda()
    elbo, sums = pl.ELBO(estimator=estimator), torch.zeros(5, device="cuda")
    with pl.handlers.sparsify(mask), pyro.validation_enabled(False):
        training.step(model, guide, elbo, optimizer, x, y, samples=2, sums=sums)  # masks are looked up once
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.step(model, guide, elbo, optimizer, x, y, samples=2, sums=sums)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()


def test_several_samples_average_the_gradient(tiny_model, tiny_data):
    # With a learning rate of 0 the history's nll over many samples must approach that of the averaged estimator.
    guide = pl.guides.mean_field(tiny_model, init_scale=1.0)
    one = [
        pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 1, "lr": 1e-12}, seed=s)[0]["nll"] for s in range(8)
    ]
    many = pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 1, "lr": 1e-12, "train_samples": 60})[0]["nll"]
    spread = torch.tensor(one).std().item()
    assert abs(many - sum(one) / 8) < 4 * spread * (1 / 8 + 1 / 60) ** 0.5


@pytest.mark.parametrize("samples", [1, 2])
def test_a_loop_of_ones_own_has_the_bits_of_train(samples, tiny_data):
    (model, guide), (own_model, own_guide) = tiny(), tiny()
    row = pl.train(model, guide, tiny_data, **QUICK | {"epochs": 1, "train_samples": samples}, seed=3, level=1)[0]

    elbo, sums = pl.ELBO(), torch.zeros(5)
    optimizer = torch.optim.Adam(pl.guides.parameter_groups(own_model, own_guide, 1e-4), 1e-3, fused=True)
    order = seeds.generator("cpu", 3, "batches", 1, 0)
    batches = Epoch(tiny_data.train, 16, "none", order)
    with seeds.rng("cpu", 3, "noise", 1, 0), training_mode(own_model, samples):
        for number in range(len(batches)):
            training.step(own_model, own_guide, elbo, optimizer, *batches.batch(number), samples=samples, sums=sums)

    for mine, whole in ((own_guide, guide), (own_model, model)):
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in mine.state_dict().items())
    nll, kl, correct, examples, finite_steps = sums
    assert (int(examples), int(finite_steps)) == (60, 4)
    assert float(nll / examples) == row["nll"]
    assert float(kl) / 4 / model.kl_temperature == row["kl"]
    assert float(correct / examples) == row["train_accuracy"]
