"""One call from a plain network and data to tickets."""

import functools
import os
import signal

import pyro.distributions as dist
import pyro.infer.autoguide as autoguide
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

import pyro_lottery as pl
from pyro_lottery import report
from pyro_lottery.controls import run_control
from pyro_lottery.errors import Stopped
from pyro_lottery.evaluate import evaluate
from pyro_lottery.runs import progress as console
from pyro_lottery.transplant import transplant_run

QUICK = {
    "levels": 2, "prune_fraction": 0.5, "epochs": 3, "milestones": (2,), "batch_size": 32, "lr": 0.01, "eval_samples":
    3,
}  # fmt: skip


def table(count=120):
    x, y = load_breast_cancer(return_X_y=True)
    return pl.data.from_tensors(x[:count], y[:count], x[count : count + 60], y[count : count + 60])


def mlp(inputs=30, outputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    return pl.find_tickets(mlp(), table(), run_dir=tmp_path_factory.mktemp("own") / "run", **QUICK)


def test_a_table_and_a_network_of_ones_own_give_a_run(classified):
    results = classified.results
    assert results["density"].tolist() == [1.0, 0.5, 0.25]
    assert results["remaining"].tolist() == [480, 240, 120]  # of 30·16 weights; the last layer is not pruned
    assert results["test_accuracy"].iloc[-1] > 0.8
    assert results["rmse"].isna().all()
    network, data = classified.level(2).load_model(), classified.load_data()
    probs = network.predict(data.test, 3, classified.config.seed)
    row = classified.row(2)
    assert pl.metrics.accuracy(probs, data.test.labels) == row.test_accuracy
    assert pl.metrics.nll(probs, data.test.labels) == row.nll
    assert (classified.folder.path / "accuracy.png").exists()
    assert (
        sum(
            int((p != 0).sum())
            for n, p in classified.level(2).posterior.loc.items()
            if n in classified.level(2).ticket.mask
        )
        <= 120
    )


def test_the_same_call_goes_on_or_returns_at_once(classified, tmp_path):
    shorter = pl.find_tickets(mlp(), table(), run_dir=tmp_path / "run", **QUICK | {"levels": 1})
    longer = pl.find_tickets(mlp(), table(), run_dir=tmp_path / "run", **QUICK)
    before = (longer.folder.path / "results.csv").read_bytes()
    again = pl.find_tickets(mlp(), table(), run_dir=tmp_path / "run", **QUICK)
    assert (again.folder.path / "results.csv").read_bytes() == before
    assert len(shorter.results) == 3
    for site, loc in classified.level(2).posterior.loc.items():
        assert torch.equal(loc, again.level(2).posterior.loc[site])


def test_the_network_stays_as_it_is(tmp_path):
    network = mlp()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = pl.find_tickets(network, table(), run_dir=tmp_path / "run", **QUICK | {"levels": 0})
    assert type(network[0]) is nn.Linear
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(
        run.level(0).ticket.start.loc["0.weight"], before["0.weight"]
    )  # whose values are the initial ones


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"network": mlp(seed=1)}, "started with another network, or from other initial values"),
        ({"network": nn.Sequential(*mlp()[:1], nn.Tanh(), mlp()[2])}, "started with another network, prior or likelihood"),
        ({"data": table(121)}, "trained on other data"),
        ({"prior": pl.priors.normal(0.3)}, "prior"),
        ({"init_scale": 0.02}, "init_scale was 0.01, now it is 0.02"),
        ({"epochs": 4}, "epochs was 3, now it is 4"),
        ({"guide": lambda model: pl.guides.mean_field(model, 0.5)}, "guide"),
        ({"guide": autoguide.AutoNormal}, "guide was mean_field, now it is own-AutoNormal"),
    ],
)  # fmt: skip
def test_what_differs_from_the_run_is_said(classified, change, line):
    given = {"network": mlp(), "data": table(), "run_dir": classified.folder.path} | QUICK | change
    before = sorted(p.name for p in classified.folder.path.iterdir())
    with pytest.raises(pl.UserError, match=line):
        pl.find_tickets(given.pop("network"), given.pop("data"), **given)
    assert sorted(p.name for p in classified.folder.path.iterdir()) == before


def test_names_without_a_folder_tell_networks_and_data_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = QUICK | {"levels": 0, "epochs": 1, "milestones": ()}
    calls = [(mlp(), table(100)), (mlp(seed=1), table(100)), (mlp(), table(101)), (mlp(), table(100))]
    paths = [str(pl.find_tickets(network, data, **quick).folder.path) for network, data in calls]
    assert [paths.index(path) for path in paths] == [0, 1, 2, 0]
    assert paths[0].startswith("runs/own-Sequential-own-mean_field")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"network": "resnet18"}, "network must be a torch.nn.Module, got a str"),
        ({"data": (torch.zeros(3, 2), torch.zeros(3))}, "data must come from pl.data.from_tensors or pl.data.from_loaders, got a tuple"),
        ({"level": 3}, "unknown option of find_tickets 'level': did you mean levels"),
        ({"arch": "lenet"}, "unknown option of find_tickets 'arch'"),
        ({"prune_fraction": 2}, "must be between 0 and 1"),
        ({"levels": 40, "prune_fraction": 0.9}, "would prune every weight"),
        ({"score": "sne"}, "unknown --score"),
        ({"guide": "mean_feld"}, "unknown --guide"),
        ({"prior": "norml"}, "unknown --prior"),
        ({"likelihood": lambda net, prior, num_data, kl_temperature: net}, "likelihood returned a Sequential"),
        ({"network": mlp(inputs=29)}, "29"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, arguments, line):
    given = {"network": mlp(), "data": table(), "run_dir": tmp_path / "run"} | QUICK | arguments
    with pytest.raises(pl.UserError, match=line) as caught:
        pl.find_tickets(given.pop("network"), given.pop("data"), **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_loaded_folder_gives_its_numbers_and_says_what_its_network_needs(classified):
    run = pl.load_run(classified.folder.path)
    assert run.results.equals(classified.results)
    assert torch.equal(run.level(1).ticket.mask["0.weight"], classified.level(1).ticket.mask["0.weight"])
    for use in (lambda: run.level(1).load_model(), lambda: run.load_data(), lambda: run.initial(0)):
        with pytest.raises(pl.UserError, match=r"find_tickets .*again"):
            use()


@pytest.mark.parametrize("control", ["reinit", "shuffle_layerwise"])
def test_controls_of_a_network_of_ones_own(classified, control):
    run = run_control(classified, control, [2])
    assert run.results["remaining"].tolist() == [120]
    loc, own = run.level(2).ticket.start.loc["0.weight"], classified.level(2).ticket.start.loc["0.weight"]
    assert not torch.equal(loc, own)


def test_a_network_that_cannot_be_drawn_anew_says_why(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.factor = mlp(), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.factor * self.body(x)

    run = pl.find_tickets(Scaled(), table(), run_dir=tmp_path / "run", **QUICK | {"levels": 1})
    with pytest.raises(pl.UserError, match=r"the network is a Scaled that has parameters but no reset_parameters\(\)"):
        run_control(run, "reinit", [1])


def test_a_deterministic_run_of_ones_own_can_be_transplanted(tmp_path):
    run = pl.find_tickets(mlp(), table(), guide=pl.guides.deterministic, run_dir=tmp_path / "run", **QUICK)
    assert run.level(1).posterior.scale is None
    moved = transplant_run(run, [2])
    assert moved.results["remaining"].tolist() == [120]
    assert moved.level(2).posterior.scale is not None


class Signalling:
    """Batches of a table that send this process a signal in the middle of one of its passes."""

    def __init__(self, split, when):
        self.split, self.when, self.passes = split, when, 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.passes += 1
        for number, (x, y) in enumerate(zip(self.split[:].chunk(4), self.split.targets.chunk(4), strict=True)):
            if (self.passes, number) == (self.when, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            yield x, y


def test_a_run_from_a_loader_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    data = table()
    options = {name: value for name, value in QUICK.items() if name != "batch_size"} | {"levels": 1}

    def find(where, when=0):
        batches = Signalling(data.train, when)
        told = pl.data.from_loaders(batches, data.test, num_data=120, num_classes=2)
        batches.passes = 0
        return pl.find_tickets(mlp(), told, run_dir=tmp_path / where, **options)

    whole = find("whole")
    with pytest.raises(Stopped):
        find("stopped", 7)
    again = find("stopped")
    assert again.results["test_accuracy"].equals(whole.results["test_accuracy"])
    for site, loc in whole.level(1).posterior.loc.items():
        assert torch.equal(loc, again.level(1).posterior.loc[site])


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    y = ((y - y.mean()) / y.std())[:, None]
    return pl.data.from_tensors(x[:300], y[:300], x[300:], y[300:])


@pytest.fixture(scope="module")
def regressed(tmp_path_factory):
    network, options = mlp(10, 1), QUICK | {"epochs": 20, "milestones": (15,)}
    return pl.find_tickets(network, diabetes(), run_dir=tmp_path_factory.mktemp("own") / "run", **options)


def test_real_targets_give_a_regression_with_a_noise_that_is_learned(regressed):
    results = regressed.results
    assert results["test_accuracy"].isna().all()
    assert results["mace"].isna().all()
    assert (results["rmse"] < 0.85).all()  # of targets whose standard deviation is 1; linear regression reaches 0.70
    assert (results["coverage_50"] < results["coverage_80"]).all()
    assert (results["coverage_80"] < results["coverage_95"]).all()
    network, test = regressed.level(2).load_model(), regressed.load_data().test
    found = pl.metrics.regression(network.predictive(test, 3, regressed.config.seed), test.targets)
    assert found["rmse"] == regressed.row(2).rmse
    assert found["nll"] == regressed.row(2).nll
    assert found["coverage_95"] == regressed.row(2).coverage_95
    assert {"train_rmse", "test_rmse"} < set(regressed.level(0).history.columns)
    assert (regressed.folder.path / "rmse.png").exists()


def test_the_learned_noise_is_kept_with_a_level_and_rewound_with_a_ticket(regressed):
    noise = [name for name in regressed.level(0).ticket.net if name.startswith("likelihood/")]
    assert len(noise) == 1
    start, later = regressed.level(0).ticket.net[noise[0]], regressed.level(2).ticket.net[noise[0]]
    assert torch.equal(start, later)
    trained = regressed.level(2)._contents.net[noise[0]]
    assert not torch.equal(trained, start)
    assert torch.equal(regressed.level(2).load_model().model.net_state()[noise[0]], trained)


def test_a_regression_is_reported_and_drawn(regressed, tmp_path):
    page = report.report([regressed, pl.load_run(regressed.folder.path)])
    assert "RMSE" in page
    assert "MACE" not in page
    pl.plot.accuracy(regressed)
    pl.plot.calibration(regressed)
    assert "rmse" in "".join(str(column.header) for column in console.results_table(regressed.folder.results()).columns)
    with pytest.raises(pl.UserError, match="real targets"):
        pl.plot.reliability(regressed, 1)
    with pytest.raises(pl.UserError, match=r"real targets; see its RMSE, NLL and coverages in results\.csv"):
        evaluate(regressed)


class Cauchy(pl.BayesianNetwork):
    """A likelihood without a mean."""

    def likelihood(self, output):
        return dist.Cauchy(output, 1.0).to_event(1)


def test_a_likelihood_without_a_mean_has_no_rmse_and_is_trained_once(tmp_path):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    data = pl.data.from_tensors(x, x[:, :1], x, x[:, :1], normalize=False)
    options = QUICK | {"levels": 1, "likelihood": Cauchy, "run_dir": tmp_path / "run"}
    run = pl.find_tickets(mlp(4, 1), data, **options)
    assert run.results["rmse"].isna().all()
    assert run.results["coverage_95"].between(0, 1).all()
    again = pl.find_tickets(mlp(4, 1), data, **options)
    assert again.results["train_seconds"].tolist() == run.results["train_seconds"].tolist()
    assert "test RMSE" in report.report([run])
    console.results_table(run.folder.results())


def test_own_distributions(tmp_path):
    run = pl.find_tickets(
        mlp(10, 1), diabetes(), likelihood=functools.partial(pl.BayesianRegressor, noise_scale=0.7),
        prior=pl.priors.laplace(0.5), guide=autoguide.AutoNormal, score=lambda posterior: pl.scores.magnitude(posterior),
        run_dir=tmp_path / "run", **QUICK | {"levels": 1},
    )  # fmt: skip
    network = run.level(1).load_model()
    assert type(network.guide).__name__ == "AutoNormal"
    assert isinstance(network.model.prior_of("0.weight"), dist.Laplace)
    assert network.model.noise_scale == 0.7
    dense, ticket = run.level(0).posterior.loc, run.level(1).ticket.mask
    kept, gone = (torch.cat([dense[n].abs()[m if keep else ~m] for n, m in ticket.items()]) for keep in (True, False))
    assert kept.min() >= gone.max()  # pruned by |loc|


def test_a_loader_with_two_outputs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 1, 20, generator=generator)
    y = torch.stack([x.mean((1, 2)), x.square().mean((1, 2))], 1)
    dataset = torch.utils.data.TensorDataset(x, y)
    train, test = (torch.utils.data.DataLoader(dataset, 32, shuffle=s) for s in (True, False))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    options = {name: value for name, value in QUICK.items() if name != "batch_size"}
    runs = [
        pl.find_tickets(net, pl.data.from_loaders(train, test), run_dir=tmp_path / name, **options) for name in "ab"
    ]
    assert runs[0].results["remaining"].tolist() == [20, 10, 5]
    assert runs[0].results["rmse"].equals(runs[1].results["rmse"])
    assert runs[0].level(1).load_model().predict(test, 2).shape == (96, 2)


def test_a_run_goes_on_with_its_own_score_alone(tmp_path):
    def find(score):
        return pl.find_tickets(
            mlp(), table(), run_dir=tmp_path / "run", score=score, **QUICK | {"levels": 1, "epochs": 1}
        )

    def largest(posterior):
        return {site: loc.abs() for site, loc in posterior.loc.items()}

    before = find(largest).results
    assert find(largest).results.equals(before)
    smallest = lambda posterior: {site: -loc.abs() for site, loc in posterior.loc.items()}  # noqa: E731
    smallest.__name__ = "largest"
    with pytest.raises(pl.UserError, match="started with another score"):
        find(smallest)


def test_a_score_that_draws_random_numbers_trains_nothing_again(tmp_path, capsys):
    """Its numbers follow the run's seed, whatever the state of torch's generator."""

    def score(posterior):
        return {name: torch.rand_like(posterior.loc[name]) for name in posterior.prunable}

    for state in (1, 2):
        data = table()
        net = mlp()
        torch.manual_seed(state)
        pl.find_tickets(net, data, run_dir=tmp_path / "run", score=score, **QUICK | {"levels": 1, "epochs": 1})
        assert len(capsys.readouterr().out.splitlines()) == (2 if state == 1 else 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_begun(mode, tmp_path):
    with mode(), pytest.raises(pl.UserError, match=r"training needs gradients; call it outside torch\.no_grad\(\)"):
        pl.find_tickets(mlp(), table(), run_dir=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_targets_of_several_dimensions_have_a_noise_for_each_channel(tmp_path):
    def images(count):
        return torch.rand(count, 2, 4, 4)

    data = pl.data.from_tensors(images(20), images(20), images(8), images(8))
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, padding=1))
    run = pl.find_tickets(network, data, levels=0, epochs=1, milestones=(), eval_samples=2, run_dir=tmp_path / "run")
    assert run.level(0).load_model().model.noise_scale.shape == (2, 1, 1)
    assert run.results["rmse"].notna().all()


def test_complex_state_is_refused_before_training(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network.register_buffer("phase", torch.ones(2, dtype=torch.cfloat))
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(
        pl.UserError, match="'phase' is complex, which no file of a run can hold; hold real and imaginary"
    ):
        pl.find_tickets(network, pl.data.from_tensors(x, y, x, y), levels=0, epochs=1, run_dir=tmp_path / "run")
