"""``--prune-fraction evidence``: the score says how many weights go, and when to stop."""

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import imp, masks, scores
from pyro_lottery.runs.config import Config
from tests.scores.test_context import context_of
from tests.support import SMALL, TinyNet

RELEVANT, IRRELEVANT, EXAMPLES, NOISE = 4, 8, 1000, 0.5


def exact_posterior(seed):
    """The exact posterior of a conjugate linear regression, half of whose relevant weights are negative; others are 0."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(RELEVANT + IRRELEVANT)
    w[:RELEVANT] = torch.tensor([1.0, -1.0, 0.7, -0.7])
    x = torch.randn(EXAMPLES, len(w), generator=generator)
    y = x @ w + NOISE * torch.randn(EXAMPLES, generator=generator)
    covariance = torch.linalg.inv(torch.eye(len(w)) + x.T @ x / NOISE**2)
    loc = covariance @ x.T @ y / NOISE**2
    return pl.Posterior({"0.weight": loc[None]}, {"0.weight": covariance.diagonal().sqrt()[None]}, ("0.weight",))


def test_savage_dickey_removes_exactly_the_irrelevant_inputs_and_stops():
    net = torch.nn.Sequential(torch.nn.Linear(RELEVANT + IRRELEVANT, 1, bias=False))
    model = pl.BayesianRegressor(net, num_data=EXAMPLES, noise_scale=NOISE)
    x = torch.zeros(2, RELEVANT + IRRELEVANT)
    context = context_of(model, pl.data.from_tensors(x, x[:, :1], x, x[:, :1], normalize=False).train)
    expected, exactly = [True] * RELEVANT + [False] * IRRELEVANT, 0
    for seed in range(200):
        posterior = exact_posterior(seed)
        found = scores.savage_dickey(posterior, context)
        mask = masks.shrink_below(masks.full(posterior), found, scores.threshold_of(scores.savage_dickey))
        exactly += mask["0.weight"][0].tolist() == expected
        assert masks.shrink_below(mask, found, 0.0)["0.weight"].equal(mask["0.weight"]), "it stops"
    assert exactly >= 0.95 * 200


def test_nothing_below_and_all_below():
    mask = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True])}
    score = {"a": torch.tensor([1.0, 2.0, -5.0]), "b": torch.tensor([0.0])}
    same = masks.shrink_below(mask, score, 0.0)
    assert all(torch.equal(same[name], mask[name]) for name in mask)
    with pytest.warns(UserWarning, match="no weight is left of 'b'"):
        less = masks.shrink_below(mask, score, 1.5)
    assert [less[name].tolist() for name in "ab"] == [[False, True, False], [False]]
    with pytest.raises(pl.UserError, match="no weight would survive: the scores of all 3 are below 3"):
        masks.shrink_below(mask, score, 3.0)
    with pytest.raises(pl.UserError, match="is NaN"):
        masks.shrink_below(mask, {"a": score["a"] * float("nan"), "b": score["b"]}, 0.0)


def options(tmp_path, **more):
    return SMALL | {"prune_fraction": "evidence", "score": "savage_dickey", "run_dir": str(tmp_path / "run")} | more


def test_a_run_prunes_by_evidence_and_goes_on_with_the_same_bits(tmp_path):
    run = imp.run_imp(Config(**options(tmp_path, levels=2)))
    remaining = run.results["remaining"].tolist()
    assert remaining == sorted(remaining, reverse=True)
    for level in range(1, len(remaining)):
        before = run.level(level - 1)
        prior = torch.distributions.Normal(0.0, 1.0)
        for site, mask in run.level(level).ticket.mask.items():
            q = torch.distributions.Normal(before.posterior.loc[site], before.posterior.scale[site].clamp(min=1e-30))
            zero = torch.zeros_like(q.loc)
            worth = prior.log_prob(zero) - q.log_prob(zero) >= 0
            assert torch.equal(mask, before.ticket.mask[site] & worth), site
    more = imp.run_imp(Config(**options(tmp_path, levels=3)))
    assert more.results["remaining"].tolist()[: len(remaining)] == remaining


def test_scores_of_the_untrained_network_refuse_nothing(tmp_path):
    """At an init_scale of a half no initial weight is worth anything; training finds some that are."""
    run = imp.run_imp(Config(**options(tmp_path, levels=1, init_scale=0.5, epochs=6, lr=0.01, milestones=())))
    assert 0 < run.results["density"].tolist()[1] < 1


def test_a_run_ends_when_all_that_is_left_is_worth_something(tmp_path):
    def worth(posterior):
        return {site: loc.abs() - 0.001 for site, loc in posterior.loc.items()}

    worth.threshold = 0.0
    x = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    data = pl.data.from_tensors(x, torch.arange(40) % 3, x, torch.arange(40) % 3)
    run = pl.find_tickets(
        TinyNet(), data, score=worth, prune_fraction="evidence", levels=6, epochs=1, milestones=(), lr=1e-6,
        rewind="lr", run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    remaining = run.results["remaining"].tolist()
    assert 1 < len(remaining) < 7
    assert len(set(remaining)) == len(remaining), "no level is trained twice"


def test_only_a_score_with_a_threshold_can_stop(tmp_path, refused):
    arguments = [
        "--arch",
        "lenet",
        "--preset",
        "smoke",
        "--run-dir",
        str(tmp_path / "run"),
        "--prune-fraction",
        "evidence",
    ]
    refused(imp.main, arguments, "needs a score that says which weights are worth nothing: savage_dickey, log_alpha")
    refused(imp.main, [*arguments[:-1], "-1"], "--prune-fraction must be between 0 and 1, both excluded, got -1")
    assert not (tmp_path / "run").exists()
    with pytest.raises(pl.UserError, match=r"--prune-fraction must be a number of .*, or evidence, got 'evidenc'"):
        Config(prune_fraction="evidenc")


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "initial_magnitude", "log_alpha"])
def test_each_score_prunes_a_run(tmp_path, score):
    run = imp.run_imp(Config(**SMALL | {"score": score, "levels": 1, "run_dir": str(tmp_path / "run")}))
    assert run.results["density"].tolist() == pytest.approx([1.0, 0.8], abs=1e-4)
    again = imp.run_imp(Config(**SMALL | {"score": score, "levels": 1, "run_dir": str(tmp_path / "again")}))
    first, second = (each.level(1).ticket.mask for each in (run, again))
    assert all(torch.equal(first[site], second[site]) for site in first)
