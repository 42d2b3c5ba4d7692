import shutil

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import controls, masks, tickets
from pyro_lottery.errors import Damaged
from tests.support import small_run


@pytest.fixture(scope="module", params=["mean_field", "deterministic"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return small_run(path, guide=request.param)


@pytest.mark.parametrize("control", tickets.CONTROLS)
def test_each_level_is_trained_again_from_its_randomised_ticket(run, control):
    found = controls.run_control(run, control)
    assert found.folder.path == run.folder.path / "controls" / control
    assert found.results["level"].tolist() == [1, 2]
    assert found.results["remaining"].tolist() == run.results["remaining"].tolist()[1:]
    assert found.folder.config["control"] == control
    first = run.level(0).ticket
    for level in (1, 2):
        ticket, original = found.level(level).ticket, run.level(level).ticket
        kept = all(torch.equal(ticket.mask[n], m) for n, m in original.mask.items())
        assert kept == (control == "reinit")
        same_values = torch.equal(ticket.start.loc["fc3.weight"], first.start.loc["fc3.weight"])
        assert same_values == (control != "reinit"), "the classifier is not pruned; only reinit changes its values"
        if control == "shuffle_layerwise":
            assert masks.density_per_site(ticket.mask) == masks.density_per_site(original.mask)
        pruned = ~ticket.mask["conv1.weight"]
        assert (found.level(level).posterior.loc["conv1.weight"][pruned] == 0).all()
    probs = found.level(2).load_model().predict(run.load_data().test, run.config.eval_samples, run.config.seed)
    assert pl.metrics.nll(probs, run.load_data().test.labels) == found.results["nll"][1]


def test_reinit_draws_another_network_at_every_level_and_the_same_one_again(run):
    found = [controls.randomised(run, level, "reinit") for level in (1, 2, 1)]
    values = [ticket.start.loc["fc3.weight"] for ticket in found]
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])


def test_a_network_that_seeds_itself_has_nothing_to_reinitialise(tmp_path, monkeypatch):
    def seeded(num_classes, in_channels):
        torch.manual_seed(0)
        return pl.create_model("lenet", num_classes, in_channels, image_size=8)

    def in_part(num_classes, in_channels):
        net = pl.create_model("lenet", num_classes, in_channels, image_size=8)
        torch.nn.init.eye_(net.fc1.weight)
        return net

    path = tmp_path / "nets_of_mine.py"
    path.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    import nets_of_mine

    nets_of_mine.seeded, nets_of_mine.in_part = seeded, in_part
    found = small_run(tmp_path / "seeded", arch="nets_of_mine:seeded", levels=1)
    with pytest.raises(pl.UserError, match="gives the same weights for every seed"):
        controls.run_control(found, "reinit")
    found = small_run(tmp_path / "part", arch="nets_of_mine:in_part", levels=1)
    with pytest.warns(UserWarning, match=r"fc1\.weight begin with the same values for every seed"):
        controls.run_control(found, "reinit")


def test_the_identity_would_train_to_the_same_bits(run, monkeypatch):
    # A control differs from its level by the ticket alone: with the ticket unchanged it ends with the level's bits.
    monkeypatch.setattr(controls, "randomised", lambda run, level, control: run.level(level).ticket)
    monkeypatch.setitem(tickets.SHUFFLES, "identity", lambda mask, generator: mask)
    monkeypatch.setattr(tickets, "CONTROLS", ("identity",))
    found = controls.run_control(run, "identity", [2])
    for name, value in run.level(2).posterior.loc.items():
        assert torch.equal(found.level(2).posterior.loc[name], value)
    assert found.results["nll"][0] == run.results["nll"][2]


def test_the_command_adds_levels_to_what_is_finished(run, tmp_path, capsys):
    path = str(small_run(tmp_path / "run").folder.path)
    assert controls.main([path, "--control", "reinit", "--levels", "2"]) == 0
    assert controls.main([path, "--control", "reinit", "--levels", "1"]) == 0
    assert pl.load_run(f"{path}/controls/reinit").results["level"].tolist() == [1, 2]
    assert f"{path}/controls/reinit" in capsys.readouterr().out


def test_bad_input_is_one_line(run, tmp_path, refused):
    path = str(run.folder.path)
    for arguments, message in [
        ([path, "--control", "rainit"], "did you mean reinit"),
        ([path, "--control", "reinit", "--levels", "7"], "--levels 7: not a finished level of .*; choose among"),
        ([path, "--control", "reinit", "--levels", "0"], "--levels 0: "),
        ([str(tmp_path), "--control", "reinit"], "is not a run folder"),
        ([str(controls.run_control(run, "reinit").folder.path), "--control", "reinit"], "is itself a control"),
    ]:
        refused(controls.main, arguments, message)


def test_rewinding_the_rate_alone_leaves_no_values_to_shuffle(tmp_path):
    lr = small_run(tmp_path / "lr", levels=1, rewind="lr")
    with pytest.raises(pl.UserError, match="which --rewind lr does not keep; use --control reinit"):
        controls.run_control(lr, "shuffle_even")
    assert controls.run_control(lr, "reinit").results["level"].tolist() == [1]


def test_late_rewinding_shuffles_over_the_late_values(tmp_path):
    late = small_run(tmp_path / "late", levels=1, rewind="epoch:1")
    ticket = controls.run_control(late, "shuffle_even").level(1).ticket
    assert torch.equal(ticket.start.loc["fc3.weight"], late.level(1).ticket.start.loc["fc3.weight"])
    shutil.copy(late.folder.path / "level_00/posterior.safetensors", late.folder.rewind_point.path)
    with pytest.raises(Damaged, match=r"rewind/posterior\.safetensors does not have the checksum"):
        controls.run_control(late, "shuffle_even")


def test_another_ticket_in_the_place_of_the_dense_one_is_not_shuffled(run, tmp_path):
    copied = pl.load_run(shutil.copytree(run.folder.path, tmp_path / "run"))
    shutil.copy(copied.folder.path / "level_01/ticket.safetensors", copied.folder.path / "level_00")
    with pytest.raises(Damaged, match=r"level_00/ticket\.safetensors does not have the checksum"):
        controls.run_control(copied, "shuffle_even")
