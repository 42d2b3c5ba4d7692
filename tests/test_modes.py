import pytest
from torch import nn

from pyro_lottery.modes import evaluating


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net[1].eval()  # frozen on purpose
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    with pytest.raises(ZeroDivisionError), evaluating(net):
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == [True, True, False, True]
