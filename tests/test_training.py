import math
import warnings

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl
from pyro_lottery import training
from pyro_lottery.errors import Diverged
from tests.conftest import TinyNet

QUICK = {"epochs": 2, "batch_size": 16, "train_samples": 1, "milestones": ()}


def test_learning_rate_by_hand():
    rates = [training.learning_rate(e, 0, 10, 1e-3, (80, 120), 0) for e in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    warm = [training.learning_rate(e, s, 10, 1.0, (), 2) for e, s in ((0, 0), (0, 9), (1, 9), (2, 0))]
    assert warm == pytest.approx([0.05, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    "make", [pl.guides.mean_field, pl.guides.deterministic, lambda m: pl.guides.auto(AutoNormal, m)]
)
def test_pruned_weights_stay_exactly_zero_through_adam_and_weight_decay(make, tiny_model, tiny_data, half_mask):
    guide = make(tiny_model)
    pl.guides.zero_pruned_(guide, half_mask)
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 25, "weight_decay": 1e-2})  # 100 steps
        samples = [guide() for _ in range(5)]
        kl = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:2], tiny_data.test.labels[:2]).kl
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


def test_the_kl_column_is_the_untempered_kl(tiny_data):
    torch.manual_seed(0)
    model = pl.BayesianClassifier(TinyNet(), num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    q = pl.posterior(guide)
    before = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(q.loc[s], q.scale[s]), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        for s in q.loc
    )
    for row in pl.train(model, guide, tiny_data, **QUICK | {"epochs": 2, "lr": 1e-9}, kl_warmup_epochs=1):
        assert row["kl"] == pytest.approx(before.item(), rel=1e-5)
        assert row["kl_weight"] == pytest.approx({1: 0.05, 2: 0.1}[row["epoch"]] / 60)
        assert row["loss"] == pytest.approx(row["nll"] + row["kl_weight"] * row["kl"])
    assert model.kl_temperature == 0.1


@pytest.mark.parametrize(
    ("family", "estimator"),
    [
        (pl.guides.mean_field, "weights"),
        (pl.guides.mean_field, "local"),
        (lambda m: pl.guides.auto(AutoNormal, m), "weights"),
    ],
)
def test_an_epoch_of_the_kl_warm_up_has_the_bits_of_its_own_temperature(family, estimator, tiny_data):
    """A quarter of T in the first of two epochs: a power of two, by which no bit is rounded."""

    def trained(temperature, warmup):
        torch.manual_seed(0)
        model = pl.BayesianClassifier(TinyNet(), num_data=60, kl_temperature=temperature)
        guide = family(model)
        pl.train(model, guide, tiny_data, **QUICK | {"epochs": 1}, estimator=estimator, kl_warmup_epochs=warmup)
        return pl.posterior(guide).loc["hidden.weight"]

    assert torch.equal(trained(0.1, 2), trained(0.025, 0))
    assert not torch.equal(trained(0.1, 2), trained(0.1, 0))


def test_same_seed_same_bits_and_another_seed_others(tiny_data):
    def trained(seed, level=0):
        torch.manual_seed(0)
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        guide = pl.guides.mean_field(model)
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


def made(make):
    torch.manual_seed(0)
    model = pl.BayesianClassifier(TinyNet(), num_data=60)
    return model, make(model)


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
@pytest.mark.parametrize("masked", [False, True])
def test_three_calls_with_one_state_have_the_bits_of_one_call_of_three_epochs(make, masked, tiny_data, half_mask):
    options = QUICK | {"milestones": (2,), "warmup_epochs": 2, "kl_warmup_epochs": 2, "train_samples": 2}

    def trained(calls, epochs):
        (model, guide), state, history = made(make), pl.TrainState(), []
        for _ in range(calls):
            with pl.handlers.sparsify(half_mask if masked else {}):
                history += pl.train(model, guide, tiny_data, **options | {"epochs": epochs}, state=state)
            pl.predict(model, guide, tiny_data.test)  # whatever happens in between
        assert state.epoch == 3
        for row in history:
            del row["seconds"]
        return history, guide.state_dict() | model.state_dict()

    (one, once), (three, thrice) = trained(1, 3), trained(3, 1)
    assert three == one
    assert all(torch.equal(thrice[name], value) for name, value in once.items())
    assert [row["epoch"] for row in one] == [1, 2, 3]


def test_a_state_of_another_training_is_refused_before_the_first_step(tiny_data, half_mask):
    (model, guide), state = made(pl.guides.mean_field), pl.TrainState()
    pl.train(model, guide, tiny_data, **QUICK, state=state)
    before = pl.posterior(guide).loc
    other = {name: ~mask for name, mask in half_mask.items()}  # as many weights, others
    with pl.handlers.sparsify(half_mask), pytest.raises(pl.UserError, match=r"another .* mask; .* TrainState\(2\)"):
        pl.train(model, guide, tiny_data, **QUICK, state=state)
    assert all(torch.equal(value, before[name]) for name, value in pl.posterior(guide).loc.items())
    state = pl.TrainState(state.epoch)
    with pl.handlers.sparsify(half_mask):
        rows = pl.train(model, guide, tiny_data, **QUICK, state=state)
    assert [row["epoch"] for row in rows] == [3, 4]
    with pl.handlers.sparsify(other), pytest.raises(pl.UserError, match="Adam's moments of another network, guide or"):
        pl.train(model, guide, tiny_data, **QUICK, state=state)
    point = made(pl.guides.deterministic)
    with pl.handlers.sparsify(half_mask), pytest.raises(pl.UserError, match="Adam's moments of another network"):
        pl.train(*point, tiny_data, **QUICK, state=state)
    with pytest.raises(pl.UserError, match="whole number, at least 0, got -1"):
        pl.train(model, guide, tiny_data, **QUICK, state=pl.TrainState(-1))


def test_ten_samples_move_batchnorm_as_far_as_one(tiny_data):
    # A point model, so that all passes see the same activations: m_10 passes of one batch must equal one pass.
    means = []
    for samples in (1, 10):
        torch.manual_seed(0)
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        with training._training_mode(model, samples):
            guide = pl.guides.deterministic(model)
            for _ in range(samples):
                pl.ELBO().terms(model, guide, tiny_data.train[:16], tiny_data.train.labels[:16])
        assert model.net.bn.momentum == 0.1
        means.append(model.net.bn.running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-5, atol=1e-7)


def test_several_samples_average_the_gradient(tiny_model, tiny_data):
    # With a learning rate of 0 the history's nll over many samples must approach that of the averaged estimator.
    guide = pl.guides.mean_field(tiny_model, init_scale=1.0)
    one = [
        pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 1, "lr": 1e-12}, seed=s)[0]["nll"] for s in range(8)
    ]
    many = pl.train(tiny_model, guide, tiny_data, **QUICK | {"epochs": 1, "lr": 1e-12, "train_samples": 60})[0]["nll"]
    spread = torch.tensor(one).std().item()
    assert abs(many - sum(one) / 8) < 4 * spread * (1 / 8 + 1 / 60) ** 0.5


def test_a_loss_that_is_not_finite_names_epoch_and_step(tiny_data):
    class Poisoned(TinyNet):
        steps = 0

        def forward(self, x):
            if self.training:
                self.steps += 1
            out = super().forward(x)
            return out * math.nan if self.steps > 4 + 3 else out

    model = pl.BayesianClassifier(Poisoned(), num_data=60)
    with pytest.raises(Diverged, match="epoch 2, step 4"):  # four steps an epoch: the eighth step is bad
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK | {"epochs": 3})


def test_a_buffer_that_is_not_finite_is_met_at_the_next_look_and_never_saved(tiny_data, monkeypatch):
    class Spoiled(TinyNet):
        def forward(self, x):
            if self.training:
                self.bn.running_var.fill_(math.nan)
            return super().forward(x)

    class Stopping(training.Hooks):
        def stopping(self):
            return True

        def stop(self, progress, optimizer):
            pytest.fail("a diverged state was to be saved")

    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    for hooks, step in ((None, 2), (Stopping(), 1)):
        model = pl.BayesianClassifier(Spoiled(), num_data=60)
        with pytest.raises(
            Diverged, match=rf"a parameter is not finite at epoch 1, step {step} \(.*: net.bn.running_var\)"
        ):
            pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK, hooks=hooks)


def test_bf16_trains_to_the_same_accuracy(tiny_data):
    accuracies = {}
    for precision in ("32", "bf16"):
        torch.manual_seed(0)
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        guide = pl.guides.mean_field(model)
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


def test_num_data_must_be_the_training_set(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), num_data=61)
    with pytest.raises(pl.UserError, match="num_data is 61, but there are 60"):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


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
        training._step(model, guide, elbo, optimizer, 1e-3, x, y, 2, "32", sums)  # masks are looked up once
        torch.cuda.set_sync_debug_mode("error")
        try:
            training._step(model, guide, elbo, optimizer, 1e-3, x, y, 2, "32", sums)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()


class Masked(TinyNet):
    """Adds a buffer that is −∞ from the start, as attention masks are, to what a softmax takes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("attention_mask", torch.zeros(6).index_fill(0, torch.tensor([1, 4]), -math.inf))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.out((self.hidden(x) + self.attention_mask).softmax(-1))


def test_a_buffer_that_is_infinite_from_the_start_is_no_divergence_unless_it_changes(tiny_data):
    model = pl.BayesianClassifier(Masked(), num_data=60)
    guide, before = pl.guides.mean_field(model), model.net.attention_mask.clone()
    assert math.isfinite(pl.train(model, guide, tiny_data, **QUICK)[-1]["loss"])
    assert torch.equal(model.net.attention_mask, before)

    class Spreading(Masked):
        def forward(self, x):
            if self.training:
                self.attention_mask[0] = -math.inf
            return super().forward(x)

    model = pl.BayesianClassifier(Spreading(), num_data=60)
    with pytest.raises(Diverged, match=r"net\.attention_mask"):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


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
    with pytest.raises(pl.UserError, match=r"gradient checkpointing runs 'blocks\.\d"):
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


@pytest.mark.filterwarnings("ignore:a density is a share")
def test_sparse_gradients_are_named_before_the_first_step():
    words, y = torch.randint(10, (8, 5)), torch.randn(8, 10)
    net = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 4, sparse=True), torch.nn.Linear(4, 10))
    model = pl.BayesianRegressor(net, num_data=8, noise_scale=1.0)
    data = pl.data.from_loaders([(words, y)])
    with pytest.raises(pl.UserError, match=r"'0' gives sparse gradients, .* build it with sparse=False"):
        pl.train(model, pl.guides.mean_field(model), data, epochs=1)
    net[0].sparse = False
    assert len(pl.train(model, pl.guides.mean_field(model), data, epochs=1)) == 1


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *((name, wrong) for name in ("epochs", "warmup_epochs", "kl_warmup_epochs") for wrong in (-1, 1.5)),
        *((name, wrong) for name in ("batch_size", "train_samples", "history_samples") for wrong in (-1, 2.5)),
        *((name, wrong) for name in ("lr", "weight_decay") for wrong in (-1, float("nan"), "a")),
        ("batch_size", 0),
        ("train_samples", 0),
    ],
)
def test_odd_numbers_are_named_before_the_first_step(option, wrong, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    before = pl.posterior(guide).loc
    with pytest.raises(pl.UserError, match=f"{option} must be a .* got {wrong!r}"):
        pl.train(tiny_model, guide, tiny_data, **{"epochs": 1, option: wrong})
    assert all(torch.equal(value, before[site]) for site, value in pl.posterior(guide).loc.items())
