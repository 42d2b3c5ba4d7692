"""Networks as graphs of torch operations, whose batch size is free and whose batch normalisations are folded."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.machine import contiguous_

aten = torch.ops.aten
FOLDED: tuple[Any, ...] = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
"""Layers that a batch normalisation after them is folded into: output channels are the weight's first dimension."""


def trace(module: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """The graph of ``module``, which is in eval mode, for any number of examples like ``inputs`` [n, ...], n > 1.

    Raises ``UserError`` if the network's code depends on the batch size or on values, or uses what torch.export refuses.
    """
    _lay_out_(module, inputs)
    shapes = ({0: torch.export.Dim("n", min=1)},)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            return torch.export.export(module, (inputs,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # it runs the network's own code
        raise UserError(f"torch.export cannot trace this network ({one_line(error)})") from error


def _lay_out_(module: nn.Module, inputs: Tensor) -> None:
    """Lay out the tensors of ``module`` as torch does by itself, if its code does not take channels-last."""
    try:
        with torch.no_grad():
            module(inputs)
    except RuntimeError:  # if it is not the layout, torch.export says what it is
        contiguous_(module)


def graph_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph as a module whose tensors can be changed, without assertions."""
    found: Any = program.module(check_guards=False)
    for node in list(found.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            found.graph.erase_node(node)
    found.recompile()
    return found


def attribute(module: nn.Module, name: str) -> Any:
    """The attribute of a graph at a dotted ``name``."""
    return reduce(getattr, name.split("."), module)


def fold_(graph: fx.GraphModule) -> dict[str, tuple[str | None, Tensor]]:
    """Fold each batch normalisation into the layer before it, in place, where the layer's output goes nowhere else.

    With a = γ/√(σ² + ε), the layer's weight becomes a·w and its bias a·(b − μ) + β. Returns, by the name of each new weight
    and bias, the name of the old one, None for a new bias, and a [channels]. A linear layer's output of more than two dimensions
    is left alone, since its channels are the last dimension and not the second.
    """
    folded: dict[str, tuple[str | None, Tensor]] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not aten.batch_norm.default or node.args[5]:
            continue
        layer, (gain, shift, mean, var), eps = node.args[0], node.args[1:5], node.args[7]
        if layer.target not in FOLDED or len(layer.users) != 1:
            continue
        if layer.target is aten.linear.default and layer.meta["val"].ndim != 2:
            continue
        weight, bias = layer.args[1:3] if len(layer.args) > 2 else (*layer.args[1:2], None)
        constants = [p for p in (weight, bias, gain, shift, mean, var) if p is not None]
        if any(p.op != "get_attr" for p in constants):
            continue
        with torch.no_grad():
            values: Any = [
                None if p is None else attribute(graph, p.target) for p in (weight, bias, gain, shift, mean, var)
            ]
            w, b, g, s, m, v = values
            a = (v + eps).rsqrt() * (1.0 if g is None else g)
            new_weight = w * a.view(-1, *(1,) * (w.ndim - 1))
            new_bias = ((0.0 if b is None else b) - m) * a + (0.0 if s is None else s)
        name = f"folded{len(folded) // 2}"
        graph.register_buffer(f"{name}_weight", new_weight)
        graph.register_buffer(f"{name}_bias", new_bias)
        with graph.graph.inserting_before(layer):
            parts = [graph.graph.get_attr(f"{name}_{part}") for part in ("weight", "bias")]
        layer.args = (layer.args[0], *parts, *layer.args[3:])
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
        folded[f"{name}_weight"] = (weight.target, a)
        folded[f"{name}_bias"] = (None if bias is None else bias.target, a)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    _drop_unused_(graph)
    return folded


def _drop_unused_(graph: fx.GraphModule) -> None:
    """Delete the tensors that no node reads."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers()) if n not in used]:
        path, _, last = name.rpartition(".")
        delattr(graph.get_submodule(path), last)
