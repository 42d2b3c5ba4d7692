"""Question: what does one pruned layer cost with our kernels, and with those of other libraries?

For every layer of a run's trained dense network, under the mask of one pruning of that network, the forward pass and the gradients
of inputs and weights are timed alone, in turns: ``torch`` is the dense layer, in channels_last; ``ours`` the sparse layer,
whose inputs are ``batch_last``; ``torch.sparse`` the products of a CSR matrix with unfolded inputs, whose folding counts too;
``SparseProp`` the faster of its two kernels (``pip install sparseprop``; left out where it is missing). Writes
``OUT/layers.csv`` and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_lottery as pl
from experiments.benchmarks.report import markdown, write
from experiments.benchmarks.sparse import SCORES
from experiments.benchmarks.steps import BATCH
from experiments.benchmarks.timing import Step, ratio_rows, time_steps
from pyro_lottery import machine, masks
from pyro_lottery.kernels import sparse
from pyro_lottery.kernels.batch_last import activations, planes
from pyro_lottery.kernels.pattern import Pattern

COLUMNS = {
    "layer": "{arch}", "kept": "{density:.2%}", "by": "{candidate}", "ms": "{step_ms:.2f}",
    "ratio to torch": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
Layer = nn.Conv2d | nn.Linear


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.layers", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of mean_field runs with a finished level 0")
    parser.add_argument("--density", type=float, default=0.012, help="of the whole network (default: 0.012)")
    parser.add_argument("--score", choices=SCORES, default="snr")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parser().parse_args(arguments)
    machine.keep_memory()
    print(
        f"{machine.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.python_version()}\n"
    )
    rows = list[dict[str, Any]]()
    for path in given.runs:
        rows += rows_of(path, given)
        write(given.out / "layers.csv", rows)
    print(markdown(rows, COLUMNS))


def rows_of(path: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run's layers, and one of all layers together for each library that has all of them."""
    run = pl.load_run(path)
    posterior, net = run.level(0).posterior, run.level(0).load_model().model
    mask = masks.shrink(masks.full(posterior), SCORES[given.score](posterior), 1 - given.density)
    batch = BATCH.get(run.config.arch, run.config.batch_size)
    rows, seconds = list[dict[str, Any]](), dict[str, list[list[float]]]()
    for name, (layer, x) in inputs(net, torch.randn(batch, run.shape.in_channels, *run.shape.image_size)).items():
        kept = mask.get(f"{name}.weight")
        if kept is None or not kept.any():
            continue
        times = time_steps(ways(layer, kept, x), given.rounds, torch.device("cpu"))
        what = f"{run.config.arch} {name} {'x'.join(map(str, kept.shape))}"
        share = {"density": float(kept.float().mean())}
        rows += [row | share for row in ratio_rows(what, batch, "32", times, "torch")]
        for way, found in times.items():
            seconds.setdefault(way, []).append(found)
    whole = {
        way: [sum(each) for each in zip(*found, strict=True)]
        for way, found in seconds.items()
        if len(found) == len(seconds["torch"])
    }
    share = {"density": masks.density(mask)}
    return rows + [row | share for row in ratio_rows(f"{run.config.arch}, all of these", batch, "32", whole, "torch")]


def inputs(model: Any, x: Tensor) -> dict[str, tuple[Layer, Tensor]]:
    """Every convolution and linear layer with a random tensor like its input, [n, c, h, w] or [n, in]."""
    found: dict[str, tuple[Layer, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, given: tuple[Tensor, ...]) -> None:
            shape = given[0].shape
            found[name] = module, torch.randn(shape if len(shape) == 4 else (shape[:-1].numel(), shape[-1]))

        return hook

    layers = [(name, m) for name, m in model.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in layers]
    with torch.no_grad():
        model.outputs(x)
    for hook in hooks:
        hook.remove()
    return found


def ways(layer: Layer, mask: Tensor, x: Tensor) -> dict[str, Step]:
    """The layer's forward pass and gradients by each library; raises ``AssertionError`` unless they agree on all three."""
    weight = torch.randn(mask.shape).masked_fill_(~mask, 0.0) / mask[0].numel() ** 0.5
    if isinstance(layer, nn.Linear):
        steps = {
            "torch": _autograd(F.linear, x, weight),
            "ours": _our_linear(x, weight, mask),
            "torch.sparse": _torch_linear(x, weight),
        }
    else:
        geometry = layer.stride, layer.padding, layer.dilation
        last, weight = (
            x.contiguous(memory_format=torch.channels_last),
            weight.contiguous(memory_format=torch.channels_last),
        )
        steps = {
            "torch": _autograd(lambda a, w: F.conv2d(a, w, None, *geometry), last, weight),
            "ours": _our_convolution(x, weight, mask, geometry),
            "torch.sparse": _torch_convolution(x, weight, geometry),
        }
    *expected, of_weight = steps["torch"]()
    expected.append(of_weight[mask].sort().values)
    prop = _sparseprop(layer, x, weight)
    for name, step in (steps | prop).items():
        *got, of_kept = step()
        got.append(of_kept[mask] if of_kept.shape == mask.shape else of_kept)
        got[-1] = got[-1].sort().values  # each library keeps weights in its own order
        for mine, wanted in zip(got, expected, strict=True):
            difference = float((mine - wanted).abs().max() / wanted.abs().max())
            assert difference < 1e-3, f"{name} differs by {difference}"
    if prop:
        quicker = min(prop, key=lambda name: sum(time_steps({name: prop[name]}, 3, x.device)[name]))
        steps["SparseProp"] = prop[quicker]
    return steps


def _autograd(function: Any, x: Tensor, weight: Tensor) -> Any:
    """A function that returns the outputs of ``function``, and the gradients of ``x`` and ``weight``."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.no_grad():
        y = function(x, weight)
        up = torch.empty_like(y).copy_(_upstream(y.shape))

    def step() -> tuple[Tensor, Tensor, Tensor]:
        y = function(x, weight)
        return y.detach(), *torch.autograd.grad(y, [x, weight], up)

    return step


def _upstream(shape: Any) -> Tensor:
    """The gradient of a layer's outputs, the same for all libraries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _our_linear(x: Tensor, weight: Tensor, mask: Tensor) -> Step:
    pattern = Pattern(mask)
    return _autograd(lambda a, w: sparse.linear(a, w, None, pattern), x, weight[mask])


def _our_convolution(x: Tensor, weight: Tensor, mask: Tensor, geometry: Any) -> Step:
    pattern, values = Pattern(mask), weight.permute(0, 2, 3, 1)[mask.permute(0, 2, 3, 1)]
    return _autograd(lambda a, w: sparse.convolution(a, w, None, pattern, *geometry), activations(planes(x)), values)


def _torch_linear(x: Tensor, weight: Tensor) -> Step:
    product, up = _Products(weight), _upstream((len(x), len(weight))).t().contiguous()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        columns = x.t().contiguous()
        y = product.forward(columns)
        of_columns, of_weight = product.backward(columns, up)
        return y.t(), of_columns.t().contiguous(), of_weight.values()

    return step


def _torch_convolution(x: Tensor, weight: Tensor, geometry: Any) -> Step:
    (stride, padding, dilation), size, n = geometry, tuple(weight.shape[2:]), len(x)
    product = _Products(weight.contiguous().flatten(1))
    out = F.conv2d(x[:1], weight, None, stride, padding, dilation).shape[2:]
    up = _upstream((n, len(weight), *out)).transpose(0, 1).flatten(1).contiguous()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        columns = F.unfold(x, size, dilation, padding, stride).permute(1, 0, 2).flatten(1)
        y = product.forward(columns)
        of_columns, of_weight = product.backward(columns, up)
        folded = of_columns.view(len(columns), n, -1).permute(1, 0, 2)
        of_x = F.fold(folded, tuple(x.shape[2:]), size, dilation, padding, stride)
        return y.view(len(y), n, *out).transpose(0, 1), of_x, of_weight.values()

    return step


class _Products:
    """The three products of a layer with a sparse matrix [out, in], as torch.sparse computes them."""

    def __init__(self, weight: Tensor):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.matrix, self.transposed = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()

    def forward(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def backward(self, columns: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return self.transposed @ up, torch.sparse.sampled_addmm(self.matrix, up, columns.t(), beta=0.0)


def _sparseprop(layer: Layer, x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Its ways to compute the layer; none if it is not installed or has no such layer."""
    try:
        modules = importlib.import_module("sparseprop.modules")
    except ImportError:
        return {}
    if isinstance(layer, nn.Linear):
        theirs = {"linear": modules.SparseLinear(weight)}
    elif layer.stride[0] > 2 or layer.dilation != (1, 1):
        return {}
    else:
        options = {"padding": layer.padding[0], "stride": layer.stride[0]}
        theirs = {
            str(over): modules.SparseConv2d(weight.contiguous(), vectorizing_over_on=over, **options)
            for over in (False, True)
        }
    x = x.contiguous()

    def way(module: Any) -> Any:
        own, up = x.clone().requires_grad_(), _upstream(module(x).shape)

        def step() -> tuple[Tensor, Tensor, Tensor]:
            y = module(own)
            return y.detach(), *torch.autograd.grad(y, [own, module.W_val], up)

        return step

    return {name: way(module) for name, module in theirs.items()}


if __name__ == "__main__":
    main()
