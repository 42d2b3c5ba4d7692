import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import pyro_lottery as pl
from pyro_lottery.controls import run_control
from tests.support import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return small_run(path)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_cost_is_the_time_of_a_step_and_the_accuracy_of_each_level(run):
    axes = pl.plot.cost(run)
    assert list(axes.lines[0].get_ydata()) == list(run.results["step_ms"])
    (other,) = (a for a in axes.figure.axes if a is not axes)
    assert list(other.lines[0].get_ydata()) == [100 * value for value in run.results["test_accuracy"]]


def test_curves_are_the_results(run):
    own = plt.figure().add_subplot()
    assert pl.draw is pl.plot  # the former name
    assert pl.plot.accuracy(run, own) is own
    lines = {line.get_label(): line for line in own.lines}
    assert lines["at the end"].get_ydata() == pytest.approx(100 * run.results["test_accuracy"])
    assert lines["at the end"].get_xdata() == pytest.approx(100 * run.results["density"])
    axes = pl.plot.calibration(run)
    assert axes.lines[0].get_ydata() == pytest.approx(run.results["mace"])
    assert axes.lines[1].get_ydata() == pytest.approx(run.results["ece"])
    axes = pl.plot.layers(run)
    assert axes.lines[2].get_ydata() == pytest.approx(
        [100 * d for d in pl.masks.density_per_site(run.level(2).ticket.mask).values()]
    )


def test_a_short_run_has_enough_ticks_to_be_read(run):
    ticks = [text.get_text() for text in pl.plot.accuracy(run).get_xticklabels()]
    assert ticks == ["100", "80", "70", "60"]  # it ends at 64 %


def test_reliability_is_what_ece_sums_up(run):
    data = run.load_data()
    probs = run.level(0).load_model().predict(data.test, run.config.eval_samples, run.config.seed)
    axes = pl.plot.reliability(run, 0)
    line = next(line for line in axes.lines if line.get_label() == "level 0")
    share = np.array([bar.get_height() for bar in axes.patches])
    gaps = np.abs(line.get_ydata() - line.get_xdata())
    assert share.sum() == pytest.approx(1)
    assert (gaps * share).sum() == pytest.approx(pl.metrics.ece(probs, data.test.labels), abs=1e-6)
    assert gaps.mean() == pytest.approx(pl.metrics.mace(probs, data.test.labels))


def test_histograms_shade_what_the_next_level_prunes(run):
    panels = pl.plot.histograms(run, 0, "snr")
    assert len(panels) == len(run.level(0).ticket.mask)
    for axes, (site, mask) in zip(panels, run.level(0).ticket.mask.items(), strict=True):
        half = len(axes.patches) // 2
        counts = [sum(bar.get_height() for bar in axes.patches[part]) for part in (slice(half), slice(half, None))]
        later = run.level(1).ticket.mask[site]
        assert counts == [mask.numel(), int((~later).sum())]
    last = pl.plot.histograms(run, 2, "loc", sites=["fc1.weight"])
    assert sum(bar.get_height() for bar in last[0].patches) == int(run.level(2).ticket.mask["fc1.weight"].sum())


def test_a_ridge_per_level_and_a_mask_as_a_picture(run):
    axes = pl.plot.ridge(run, "scale")
    assert len(axes.lines) == 3
    axes = pl.plot.mask(run, 2, "conv2.weight")
    picture = torch.tensor(np.asarray(axes.images[0].get_array()).astype(bool))
    assert torch.equal(picture, run.level(2).ticket.mask["conv2.weight"].flatten(1))


def test_a_weight_against_its_prior(run):
    place = tuple(run.level(1).ticket.mask["conv1.weight"].nonzero()[0].tolist())
    axes = pl.plot.weight(run, 1, "conv1.weight", place)
    assert axes.get_xlabel() == f"conv1.weight{list(place)}"
    assert pl.plot.weight(run, 1, "conv1.weight", np.asarray(place)).get_xlabel() == axes.get_xlabel()
    curves = {line.get_label(): line for line in axes.lines}
    posterior = run.level(1).posterior
    loc, scale = posterior.loc["conv1.weight"][place], posterior.scale["conv1.weight"][place]
    x = torch.as_tensor(curves["posterior"].get_xdata())
    assert torch.as_tensor(curves["posterior"].get_ydata()).numpy() == pytest.approx(
        torch.distributions.Normal(loc, scale).log_prob(x).exp().numpy(), rel=1e-4
    )
    assert torch.as_tensor(curves["prior"].get_ydata()).numpy() == pytest.approx(
        torch.distributions.Normal(0.0, 1.0).log_prob(x).exp().numpy(), rel=1e-4
    )


def test_what_cannot_be_plotted_is_named(run, tmp_path):
    pruned = tuple((~run.level(2).ticket.mask["fc1.weight"]).nonzero()[0].tolist())
    point = small_run(tmp_path / "d", levels=0, guide="deterministic")
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "config.json").write_bytes((run.folder.path / "config.json").read_bytes())
    unfinished = pl.load_run(tmp_path / "u")
    assert list(unfinished.results.columns) == list(run.results.columns)
    for what, message in [
        (lambda: pl.plot.mask(run, 1, "conv1.wieght"), "unknown site 'conv1.wieght': did you mean conv1.weight"),
        (lambda: pl.plot.histograms(run, 0, "sigma"), "unknown quantity 'sigma'"),
        (lambda: pl.plot.weight(run, 2, "fc1.weight", pruned), "is pruned at level 2, so it is exactly 0"),
        (lambda: pl.plot.weight(run, 2, "fc1.weight", (9999, 0)), r"has no weight at \(9999, 0\); its shape is"),
        (lambda: pl.plot.ridge(point), "a deterministic run has no snr; plot loc"),
        (lambda: pl.plot.weight(point, 0, "fc1.weight", (0, 0)), "no posterior density"),
        (lambda: pl.plot.reliability(run, 9), "no finished level 9"),
        (lambda: pl.tables.layers([run], 9), "--levels 9: not a finished level of "),
        *(
            (lambda plot=plot: plot(unfinished), "has no finished level yet")
            for plot in (
                pl.plot.accuracy,
                pl.plot.calibration,
                pl.plot.layers,
                pl.plot.cost,
                pl.plot.ridge,
                lambda run: pl.tables.layers([run]),
            )
        ),
    ]:
        with pytest.raises(pl.UserError, match=message):
            what()
    assert pl.plot.ridge(point, "loc").lines
    assert len(pl.plot.weight(run, 0, "fc1.bias", 3).lines) == 2
    assert len(pl.plot.weight(run, 0, "fc1.bias", np.int64(3)).lines) == 2


def test_a_control_is_not_said_to_be_pruned_next(run):
    control = run_control(run, "shuffle_global", [1, 2])
    assert all("0 % pruned next" in axes.get_title() for axes in pl.plot.histograms(control, 1))
