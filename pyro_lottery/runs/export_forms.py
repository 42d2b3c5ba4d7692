"""What an export can be: a trained network as a graph of draws, means or moments, or as a small ticket file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, fx, nn

from pyro_lottery import files, guides, masks, metrics, prediction
from pyro_lottery.data import Split
from pyro_lottery.errors import UserError
from pyro_lottery.exports import formats, graphs
from pyro_lottery.exports.moments import Moments
from pyro_lottery.exports.networks import Drawn, Logits, Pixels, outputs
from pyro_lottery.exports.state_dicts import LAYOUTS, state_dict
from pyro_lottery.handlers import sparsify
from pyro_lottery.handlers.used_weights import transformed
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.runs.config import RESUMABLE, Config
from pyro_lottery.runs.packed_ticket import PACKED
from pyro_lottery.runs.trained import TrainedNetwork
from pyro_lottery.types import Mask, Ticket

if TYPE_CHECKING:
    from pyro_lottery.runs.loaded import Level

CERTAIN = 1e-4
"""Largest difference of a probability between a network of moments without variances and the mean network."""
STATE = "model.pt"
"""The file of a state dict in its folder."""
Outputs = dict[str, Tensor]
"""Outputs of a network by name."""


@dataclass(frozen=True)
class Job:
    """A trained network, the images that it is tested on, and what is to be written."""

    level: Level
    network: TrainedNetwork
    test: Split
    form: str
    format: str
    samples: int
    seed: int
    dtype: str

    @property
    def pixels(self) -> Pixels:
        """The normalisation."""
        return Pixels(self.test.mean, self.test.std)

    @property
    def two(self) -> Tensor:
        """A test image twice, uint8 [2, c, h, w], by which the network is traced for any batch size."""
        return self.test.inputs[:1].expand(2, -1, -1, -1)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; their numbers if they have no names."""
        return list(self.network.classes or map(str, range(self.level.run.shape.classes)))

    def facts(self, file: str, outputs: Iterable[str]) -> dict[str, Any]:
        """What a file says about itself."""
        run, row = self.level.run, self.level.run.row(self.level.number)
        drawn = {"samples": self.samples, "seed": self.seed} if self.form == "draws" else {}
        return {
            "file": file, "form": self.form, "format": self.format, "dtype": self.dtype, **drawn, "arch": run.config.arch,
            "level": self.level.number, "density": row.density, "remaining": row.remaining, "total": row.total,
            "classes": self.classes,
            "image_shape": list(self.test.inputs.shape[1:]), "resize": run.config.image_size is not None,
            "mean": self.test.mean.tolist(), "std": self.test.std.tolist(), "outputs": list(outputs),
        }  # fmt: skip


def write_graph(job: Job, place: Path) -> tuple[Outputs, dict[str, Any]]:
    """Write a network as a graph into the folder ``place``; returns what it must compute for the test images, and its facts."""
    module, expected = _MAKERS[job.form](job)
    name, save, _ = formats.GRAPHS[job.format]
    facts = job.facts(name, expected)
    images = job.two
    graph = graphs.graph_of(graphs.trace(module, images))
    graphs.fold_(graph)
    save(graphs.trace(graph, images), place / name, facts)
    return expected, facts


def pack(job: Job, place: Path) -> tuple[Outputs, dict[str, Any]]:
    """Write a network as a small ticket file; returns as :func:`write_graph`."""
    network, config = job.network, job.level.run.config
    posterior = masks.apply(network.mask, guides.posterior(network.guide))
    if job.form == "mean" or guides.is_point(network.guide):
        posterior = replace(posterior, scale=None, extra={})
        _, expected = _of_mean(job)
    else:
        _, expected = _of_draws(job)
    facts = job.facts(PACKED, expected)
    options = {f.name: getattr(config, f.name) for f in fields(Config) if f.name not in RESUMABLE}
    whole = Ticket(network.mask, posterior, network.model.net_state())
    whole.pack(place / PACKED, job.dtype, {"facts": facts, "config": options, "data": asdict(job.level.run.shape)})
    tensors = (*posterior.loc.values(), *(posterior.scale or {}).values(), *whole.net.values())
    return expected, facts | {"dense_bytes": sum(value.nbytes for value in tensors)}


def _of_draws(job: Job) -> tuple[nn.Module, Outputs]:
    network = job.network
    found: Any = network.predictive(job.test, job.samples, job.seed)
    with network.pruned(), network.draws(job.seed):
        draws = prediction.drawn_weights(network.model, network.guide, job.samples)
    return Drawn(network.model, draws, network.mask, job.pixels), {
        name: getattr(found, name) for name in outputs(job.samples)
    }


def _of_mean(job: Job) -> tuple[Drawn, Outputs]:
    network = job.network
    probs = network.predict_mean(job.test)
    with network.pruned():
        weights = prediction.mean_weights(network.model, network.guide)
    expected = dict(zip(outputs(1), (probs, metrics.entropy(probs)), strict=True))
    return Drawn(network.model, [weights], network.mask, job.pixels), expected


def _of_moments(job: Job) -> tuple[nn.Module, Outputs]:
    if job.level.posterior.scale is None:
        raise UserError(f"guide {job.level.run.config.guide} has no variances; use --form mean")
    network, x = job.network, job.test.prepare(job.two)
    graph, variances = moments_of(network.model, network.guide, network.mask, x)
    _check_moments(job, graph, variances)
    module = Moments(graph, variances, job.pixels, job.level.run.shape.classes)
    with torch.no_grad():
        parts = [module(part) for part in job.test.inputs.split(prediction.BATCH)]
    return module, {name: torch.cat(each) for name, each in zip(outputs(1), zip(*parts, strict=True), strict=True)}


def _check_moments(job: Job, graph: fx.GraphModule, variances: dict[str, Tensor]) -> None:
    """Raise ``UserError`` unless the rules give the mean network's outputs for weights without variance."""
    certain = {name: torch.zeros_like(spread) for name, spread in variances.items()}
    module = Moments(graph, certain, job.pixels, job.level.run.shape.classes)
    images = job.test.inputs[:32]
    with torch.no_grad():
        found = module(images)[0]
    difference = float((found - job.network.predict_mean(job.test.prepare(images))).abs().max())
    if not difference <= CERTAIN:
        raise UserError(
            f"--form moments computes another network than this one: without variances they differ by {difference:.1g}; use "
            "--form draws"
        )


def moments_of(
    model: BayesianNetwork, guide: AutoGuide, mask: Mask, x: Tensor
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The network of mean weights from normalised images like ``x`` [n, ...] to logits, and its weights' variances by their names."""
    with sparsify(mask):
        weights = prediction.mean_weights(model, guide)
    scale = masks.apply(mask, guides.posterior(guide)).scale
    assert scale is not None
    mean = Drawn(model, [weights], mask, Pixels(torch.zeros(1), torch.ones(1)))
    graph = graphs.graph_of(graphs.trace(Logits(mean), x))
    variances = {f"network.{mean.name_of(0, site)}": scale[site].square() for site in mean.sites}
    for new, (old, factor) in graphs.fold_(graph).items():
        if old in variances:  # and stays, since another place may use it too
            spread = variances[old]
            variances[new] = spread * factor.square().view(-1, *(1,) * (spread.ndim - 1))
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    return graph, {name: spread for name, spread in variances.items() if name in read}


_MAKERS: dict[str, Callable[[Job], tuple[nn.Module, Outputs]]] = {
    "draws": _of_draws, "mean": _of_mean, "moments": _of_moments,
}  # fmt: skip
"""For each form of a graph, the function that makes the module and computes the outputs that it must have."""


def write_state(job: Job, place: Path) -> tuple[Outputs, dict[str, Any]]:
    """Write the mean weights as a state dict of PyTorch; returns as :func:`write_graph`."""
    changed = [] if masks.is_full(job.network.mask) else transformed(job.network.model.net)
    if changed:
        raise UserError(
            f"--format {job.format} holds weights alone, but {changed[0]!r} is transformed before its layer uses it, and a plain network "
            "would compute with pruned weights; use pt2 or safetensors"
        )
    _, expected = _of_mean(job)
    posterior = replace(guides.posterior(job.network.guide), scale=None)
    whole = Ticket(job.network.mask, masks.apply(job.network.mask, posterior), job.network.model.net_state())
    content = io.BytesIO()
    torch.save(state_dict(whole, job.format), content)
    files.write_atomic(place / STATE, content.getvalue())
    return expected, job.facts(STATE, expected)


WRITERS: dict[str, Callable[[Job, Path], tuple[Outputs, dict[str, Any]]]] = {
    "onnx": write_graph, "pt2": write_graph, "safetensors": pack,
    **dict.fromkeys(LAYOUTS, write_state),
}  # fmt: skip
"""For each format, the function that writes it."""
