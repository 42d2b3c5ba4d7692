import warnings

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl
from tests.support import QUICK, TinyNet, tiny


@pytest.mark.parametrize(
    "make", [pl.guides.mean_field, pl.guides.deterministic, lambda m: pl.guides.auto(AutoNormal, m)]
)
def test_pruned_weights_stay_exactly_zero_through_adam_and_weight_decay(make, tiny_model, tiny_data, half_mask):
    guide = make(tiny_model)
    pl.guides.zero_pruned_(guide, half_mask)
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 25, "weight_decay": 1e-2})  # 100 steps
        samples = [guide() for _ in range(5)]
        kl = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:2], tiny_data.test.labels[:2]).tempered_kl
    loc = pl.posterior(guide).loc
    for site, mask in half_mask.items():
        assert (loc[site][~mask] == 0).all()
        assert all((sample[site][~mask] == 0).all() for sample in samples)
        assert (loc[site][mask] != 0).all()
    assert kl.isfinite()


def test_learns_and_writes_a_consistent_history(tiny_model, tiny_data):
    history = pl.train(
        tiny_model,
        pl.guides.mean_field(tiny_model),
        tiny_data,
        **QUICK | {"epochs": 20, "lr": 0.02, "milestones": (15,), "seed": 1},  # with 0 all units of a class die
    )
    assert [row["epoch"] for row in history] == list(range(1, 21))
    for row in history:
        assert row["kl_weight"] == pytest.approx(0.1 / 60)
        assert row["loss"] == pytest.approx(row["nll"] + row["kl_weight"] * row["kl"])
    assert history[-1]["test_accuracy"] > 0.9
    assert history[-1]["lr"] == pytest.approx(0.002)


def test_same_seed_same_bits_and_another_seed_others(tiny_data):
    def trained(seed, level=0):
        model, guide = tiny()
        torch.manual_seed(torch.randint(1000, (1,)).item() + seed)  # the global generator must not matter
        pl.train(model, guide, tiny_data, **QUICK, seed=seed, level=level)
        return pl.posterior(guide).loc["hidden.weight"]

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))
    assert not torch.equal(trained(3), trained(3, level=1))


def test_the_global_generator_is_left_alone(tiny_model, tiny_data):
    state = torch.get_rng_state()
    pl.train(tiny_model, pl.guides.mean_field(tiny_model), tiny_data, **QUICK)
    assert torch.equal(state, torch.get_rng_state())


def test_bf16_trains_to_the_same_accuracy(tiny_data):
    accuracies = {}
    for precision in ("32", "bf16"):
        model, guide = tiny()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns where bf16 is emulated
            history = pl.train(model, guide, tiny_data, **QUICK | {"epochs": 20, "lr": 0.02}, precision=precision)
        accuracies[precision] = history[-1]["test_accuracy"]
        assert guide.loc.dtype == torch.float32
    assert min(accuracies.values()) > 0.85


def test_validation_accuracy_is_filled(tiny_data, tiny_model):
    from dataclasses import replace

    history = pl.train(tiny_model, pl.guides.mean_field(tiny_model), replace(tiny_data, val=tiny_data.test), **QUICK)
    assert all(0 <= row["val_accuracy"] <= 1 for row in history)


class Checkpointed(TinyNet):
    """Computes its hidden layer anew in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = torch.nn.functional.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        return self.out(checkpoint(lambda x: torch.relu(self.hidden(x)), x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")  # of torch, in predictions
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_gradient_checkpointing_is_refused_in_one_line(tiny_data, reentrant, estimator):
    model = pl.BayesianClassifier(Checkpointed(reentrant), num_data=60)
    guide = pl.guides.mean_field(model)
    with pytest.raises(pl.UserError, match=r"^(?=.*gradient checkpointing).*'hidden\.weight'") as error:
        pl.train(model, guide, tiny_data, **QUICK, estimator=estimator)
    assert "\n" not in str(error.value)
    assert pl.predict(model, guide, tiny_data.test).shape == (24, 3)  # where no gradient is asked for


def test_timms_gradient_checkpointing_is_refused_in_one_line():
    import timm

    net = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3, depth=2, embed_dim=12, num_heads=3)
    net.set_grad_checkpointing()
    images, labels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4) % 3
    model = pl.BayesianClassifier(net, num_data=4)
    with pytest.raises(pl.UserError, match=r"gradient checkpointing reruns 'blocks\.\d"):
        pl.train(model, pl.guides.mean_field(model), pl.data.from_tensors(images, labels, images, labels), **QUICK)


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_a_3d_convolution_trains_as_the_2d_one_that_it_is(tiny_data, estimator):
    class Deep(TinyNet):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1))

        def forward(self, x):
            x = torch.relu(self.bn(self.conv(x[:, :, None])[:, :, 0]))
            return self.out(torch.relu(self.hidden(torch.nn.functional.avg_pool2d(x, 2).flatten(1))))

    start, trained = TinyNet().state_dict(), []
    for net in (TinyNet(), Deep()):
        net.load_state_dict(
            {n: v.view(net.get_parameter(n).shape) if n == "conv.weight" else v for n, v in start.items()}
        )
        model = pl.BayesianClassifier(net, num_data=60)
        guide = pl.guides.deterministic(model)
        pl.train(model, guide, tiny_data, **QUICK, estimator=estimator)
        trained.append(pl.posterior(guide).loc["conv.weight"])
    torch.testing.assert_close(trained[1].view(4, 1, 3, 3), trained[0])
