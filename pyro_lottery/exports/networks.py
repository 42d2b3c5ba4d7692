"""The network of a finished level as one module without random numbers: uint8 images in, probabilities and entropies out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_lottery.exports.predictor import OUTPUTS
from pyro_lottery.metrics import mutual_information
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.model.fixed import bare, with_weights
from pyro_lottery.model.outputs import one_tensor
from pyro_lottery.types import Mask, Sites


class Pixels(nn.Module):
    """Normalises uint8 images [n, c, h, w] as ``Split.normalize`` does: (images / 255 − mean) / std, both [c]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1).clone())
        self.register_buffer("std", std.view(-1, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        """Floats of the same shape."""
        return (images.float() / 255 - self.mean) / self.std


class Drawn(nn.Module):
    """A classifier with the weights of each of ``draws``; a call returns those of ``OUTPUTS``.

    ``draws`` hold a value per site, with 0 where ``mask`` prunes it. For several draws the outputs are p̄ [n, classes], the mean of
    the draws' softmaxes, and its total, aleatoric and epistemic entropy [n] in nats.
    """

    def __init__(self, model: BayesianNetwork, draws: Sequence[Sites], mask: Mask, pixels: Pixels):
        super().__init__()
        self.pixels, self.net, self.count = pixels, bare(model.net, model.sites, mask), len(draws)
        self.sites = model.sites
        for number, draw in enumerate(draws):
            for site in self.sites:
                self.register_buffer(self.name_of(number, site), draw[site].detach().clone())

    def name_of(self, number: int, site: str) -> str:
        """The name of the buffer with one draw's value of a site."""
        return f"draw{number}_{self.sites.index(site)}"

    def logits(self, number: int, x: Tensor) -> Tensor:
        """The logits [n, classes] of normalised images with the weights of one draw."""
        values = {site: self.get_buffer(self.name_of(number, site)) for site in self.sites}
        with with_weights(self.net, values):
            return one_tensor(self.net(x))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs for uint8 images [n, c, h, w]."""
        x = self.pixels(images)
        return summary(torch.stack([self.logits(number, x).softmax(-1) for number in range(self.count)]))


class Logits(nn.Module):
    """The logits [n, classes] of a network of one draw, for normalised images."""

    def __init__(self, network: Drawn):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The logits [n, classes]."""
        return self.network.logits(0, x)


def outputs(count: int) -> tuple[str, ...]:
    """Names of the outputs of a network of ``count`` draws; knowing the weights, one draw has no epistemic entropy."""
    return tuple(OUTPUTS[count > 1])


def summary(probs: Tensor) -> tuple[Tensor, ...]:
    """The outputs, given the class probabilities [draws, n, classes]."""
    if len(probs) == 1:
        return probs[0], entropy(probs[0])
    mean = probs.mean(0)
    total, aleatoric = entropy(mean), entropy(probs).mean(0)
    return mean, total, aleatoric, mutual_information(total, aleatoric)


def entropy(probs: Tensor) -> Tensor:
    """The entropy −Σ_c p_c log p_c in nats [...] of probabilities [..., classes], in operations that ONNX has."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)
