import pytest
import timm
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import nets

# Weights (without biases and normalisation) by hand: 3·3·in·out per convolution, in·out per linear layer.
SIZES = {
    "resnet20": 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64) + 16 * 32 + 32 * 64 + 640,
    "vgg11": 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512) + 5120,
    "resnet18": 9
    * (3 * 64 + 4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2)
    + 64 * 128 + 128 * 256 + 256 * 512 + 5120,
    "lenet": 25 * (3 * 6 + 6 * 16) + 1024 * 120 + 120 * 84 + 840,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SIZES))
def test_weights_counted_by_hand(name):
    net = pl.create_model(name)
    weights = [m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(weights) == SIZES[name]


@pytest.mark.parametrize("name", [*pl.list_models(), "timm:resnet10t"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 8, 7)])
def test_every_network_takes_cifar_and_digits(name, channels, size, classes):
    if name == "timm:resnet10t" and size == 8:
        pytest.skip("a stem of stride 4 leaves nothing of 8×8")
    if name == "vit_base":
        size = 8  # the same code as vit_tiny, and 85 M weights
    net = pl.create_model(name, classes, channels, size).eval()
    with torch.no_grad():
        out = net(torch.randn(2, channels, size, size))
    assert out.shape == (2, classes)
    assert out.isfinite().all()
    assert not any("pyro" in type(m).__module__.split(".")[0:1] for m in net.modules())


def test_vit_patches_make_64_tokens_unless_told():
    assert pl.create_model("vit_tiny").patch_embed.num_patches == 64
    assert pl.create_model("vit_tiny", patch_size=2).patch_embed.num_patches == 256


def test_networks_start_at_kaiming_uniform():
    for name, layer in (("resnet20", "layer3.0.conv1"), ("vit_tiny", "blocks.0.mlp.fc1")):
        weight = pl.create_model(name).get_submodule(layer).weight
        bound = weight[0].numel() ** -0.5  # PyTorch's kaiming_uniform_(a=√5) is U(−1/√fan_in, 1/√fan_in)
        assert 0.99 * bound < weight.abs().max() <= bound


def test_unknown_names_say_what_would_be_right():
    with pytest.raises(pl.UserError, match="did you mean resnet18"):
        pl.create_model("resnet_18")
    with pytest.raises(pl.UserError, match="unknown timm model"):
        nets.check_name("timm:no_such_net")
    with pytest.raises(pl.UserError, match="patch_size"):
        pl.create_model("vgg11", patch_size=2)
    assert timm.is_model("resnet10t")
