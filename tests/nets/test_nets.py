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


def test_height_and_width_may_be_given_if_they_are_equal():
    for name in ("lenet", "vit_tiny"):
        assert pl.create_model(name, 7, 1, (8, 8))(torch.randn(2, 1, 8, 8)).shape == (2, 7)
        with pytest.raises(pl.UserError, match=f"--arch {name} takes square images, not 8×12"):
            pl.create_model(name, 7, 1, (8, 12))


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
    with pytest.raises(pl.UserError, match="unknown --arch 'timm:"):
        nets.check_name("timm:no_such_net")
    with pytest.raises(pl.UserError, match="--patch-size is for --arch vit_tiny"):
        pl.create_model("vgg11", patch_size=2)
    assert timm.is_model("resnet10t")


class Small(nn.Module):
    """A network of a user's own for any image: mean brightness of its rows, two linear layers."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.height = image_size if isinstance(image_size, int) else image_size[0]
        self.hidden = nn.Linear(self.height, 16)
        self.out = nn.Linear(16, num_classes)
        self.slope = torch.linspace(0, 1, 3)[1].item()  # which fails on the meta device

    def forward(self, x):
        return self.out(nn.functional.leaky_relu(self.hidden(x.mean((1, 3))), self.slope))


def everything(**options):
    assert options == {"num_classes": 7, "in_channels": 2, "image_size": (6, 4)}
    return Small(options["num_classes"], options["image_size"])


ONE = Small(10, 8)


def the_same_one():
    return ONE


def needs_more(num_classes, depth):
    return Small(num_classes, 8)


def fails():
    raise RuntimeError("no such file\nand more")


def gives_a_list():
    return [Small(10, 8)]


def logits_too_few():
    return Small(3, 8)


NO_FUNCTION = 5


def test_a_function_of_the_users_gets_what_it_takes():
    mine = f"{__name__}:"
    assert pl.create_model(mine + "Small", 5, 3, 8).out.weight.shape == (5, 16)
    net = pl.create_model(mine + "everything", 7, 2, (6, 4))
    assert net(torch.zeros(1, 2, 6, 4)).shape == (1, 7)
    one, other = (pl.create_model(mine + "the_same_one") for _ in range(2))
    assert one is not other
    assert torch.equal(one.out.weight, ONE.out.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs_more", "requires depth, but it is called with num_classes, in_channels, image_size only"),
        ("fails", r"failed \(RuntimeError: no such file\)"),
        ("gives_a_list", r"returned a list; expected a torch\.nn\.Module"),
        ("NO_FUNCTION", "is a int; expected a class or a function"),
        ("missing", "cannot be imported .* expected package.module:name"),
    ],
)
def test_what_a_users_function_does_wrong_is_one_line(name, message):
    with pytest.raises(pl.UserError, match=f"--arch {__name__}:{name}:? {message}") as raised:
        pl.create_model(f"{__name__}:{name}")
    assert "\n" not in str(raised.value)


def test_a_dotted_path_says_where_the_colon_goes():
    with pytest.raises(
        pl.UserError, match=r"import paths are written package\.module:function; use tests\.nets\.test_nets:Small"
    ):
        nets.check_name("tests.nets.test_nets.Small")
    for name in ("a:b:c", "not an arch:f", ":f", "a:", "1a:f"):
        with pytest.raises(pl.UserError, match="unknown --arch"):
            nets.check_name(name)
    with pytest.raises(pl.UserError, match="unknown --arch 'timm:"):
        nets.check_name("timm:create_model")
