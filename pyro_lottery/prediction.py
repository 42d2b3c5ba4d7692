"""Class probabilities from posterior samples or from the mean weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import guides, metrics
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers import active_mask
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import evaluating
from pyro_lottery.regression import BayesianRegressor
from pyro_lottery.threads import TURN

PRECISIONS = ("32", "bf16")
BATCH = 500
"""Images that are predicted at once, unless told."""


class Images(Protocol):
    """Normalised images by slice: a float tensor [n, c, h, w] or a :class:`pyro_lottery.data.Split`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; others emulate it, ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the device has it, else 32."""
    return ("bf16" if has_bf16(device) else "32") if name == "auto" else name


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: bf16 autocast, or nothing for fp32."""
    precision = resolve_precision(precision, device)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, (*PRECISIONS, "auto"))
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def predict(
    model: BayesianNetwork,
    guide: AutoGuide,
    images: Images,
    num_samples: int = 10,
    *,
    batch_size: int = BATCH,
    precision: str = "32",
    aggregate: bool = True,
) -> Tensor:
    """Class probabilities [n, classes]: the softmax averaged over ``num_samples`` draws of the weights (paper §3).

    With ``aggregate=False`` those of every draw, [samples, n, classes]; their mean is the average but for rounding.
    Every draw is used for all images. Buffers, training mode and gradients are left as they were. Draws follow
    torch's global generator; a point guide takes one sample whatever is asked for. Raises ``UserError`` if the guide is
    of another model, whose sites or shapes differ. Threads take turns, prediction by prediction.
    """
    with TURN:
        if not aggregate:
            return torch.stack(list(_draws(model, guide, images, num_samples, batch_size, precision)))
        return last(predictives(model, guide, images, num_samples, batch_size=batch_size, precision=precision)).probs


@dataclass(frozen=True, eq=False)
class Predictive:
    """What draws of the weights say of images: class probabilities, and how much of their entropy is of which kind."""

    probs: Tensor
    """Softmax averaged over draws, p̄ [n, classes]."""
    aleatoric: Tensor
    """Mean entropy of a draw's softmax [n], in nats: what the data leave open whatever the weights."""
    num_samples: int

    @property
    def total(self) -> Tensor:
        """Entropy of p̄ [n], in nats: aleatoric + epistemic."""
        return metrics.entropy(self.probs)

    @property
    def epistemic(self) -> Tensor:
        """total − aleatoric [n]: the mutual information of label and weights, at least 0."""
        return self.total - self.aleatoric


def predictives(
    model: BayesianNetwork,
    guide: AutoGuide,
    images: Images,
    num_samples: int = 10,
    *,
    batch_size: int = BATCH,
    precision: str = "32",
) -> Iterator[Predictive]:
    """The predictive from 1, 2, ... ``num_samples`` draws of the weights, as :func:`predict` draws them; memory does not
    grow with their number. Threads take turns, draw by draw.
    """
    total: Any = 0.0
    entropies: Any = 0.0
    for count, probs in enumerate(_draws(model, guide, images, num_samples, batch_size, precision), 1):
        total, entropies = total + probs, entropies + metrics.entropy(probs)
        yield Predictive(total / count, entropies / count, count)


def _draws(
    model: BayesianNetwork, guide: AutoGuide, images: Images, num_samples: int, batch_size: int, precision: str
) -> Iterator[Tensor]:
    """The class probabilities [n, classes] of one draw of the weights after the other."""
    _check_classifier(model)
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}; predict_mean uses the mean weights")
    with TURN:
        guides.check_sites(model, guide)
    for _ in range(1 if guides.is_point(guide) else num_samples):
        with inference(model):
            trace = poutine.trace(guide).get_trace()
            weights: dict[str, Any] = {
                name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"
            }
            probs = _softmax(model, weights, images, batch_size, precision)
        yield probs


def last(every: Iterator[Predictive]) -> Predictive:
    """The predictive from all draws, without keeping those from fewer."""
    return deque(every, maxlen=1).pop()


def predict_mean(
    model: BayesianNetwork, guide: AutoGuide, images: Images, *, batch_size: int = BATCH, precision: str = "32"
) -> Tensor:
    """Class probabilities [n, classes] of the network whose weights are the posterior's locs: one pass, no randomness."""
    _check_classifier(model)
    return logits_mean(model, guide, images, batch_size=batch_size, precision=precision).softmax(-1)


def logits_mean(
    model: BayesianNetwork, guide: AutoGuide, images: Images, *, batch_size: int = BATCH, precision: str = "32"
) -> Tensor:
    """Outputs [n, d] of the network whose weights are the posterior's locs (0 where ``sparsify`` prunes)."""
    with TURN:
        guides.check_guide(guide)
        guides.check_sites(model, guide)
        weights: dict[str, Tensor] = {}
        for name, loc in guides.values_at_loc(guide).items():
            mask = active_mask(name, loc.shape)
            weights[name] = loc if mask is None else loc.masked_fill_(~mask.to(loc.device), 0.0)
        with inference(model):
            return torch.cat(list(_outputs(model, weights, images, batch_size, precision)))


def _check_classifier(model: BayesianNetwork) -> None:
    if isinstance(model, BayesianRegressor):
        raise UserError("a BayesianRegressor has no class probabilities; use logits_mean, or sample guide and network")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients and Pyro's validation, and without other threads; all as it was afterwards."""
    with TURN, evaluating(model), torch.no_grad(), pyro.validation_enabled(False):
        yield


def _outputs(
    model: BayesianNetwork, weights: dict[str, Tensor], images: Images, batch_size: int, precision: str
) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        with poutine.condition(data=weights), autocast(batch.device, precision):
            yield model.outputs(channels_last(batch))


def _softmax(
    model: BayesianNetwork, weights: dict[str, Tensor], images: Images, batch_size: int, precision: str
) -> Tensor:
    return torch.cat([out.softmax(-1) for out in _outputs(model, weights, images, batch_size, precision)])


def channels_last(images: Tensor) -> Tensor:
    """Images in the layout in which convolutions are fastest on processors and GPUs alike."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def channels_last_(module: nn.Module) -> None:
    """Bring every weight and buffer of four dimensions to that layout, in place; those of Conv3d have five, and stay."""
    module._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)
