"""ONNX models that store only the weights that are not 0: the runtime places them into zeros when it loads the file."""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST = 1024
"""Elements of a tensor below which storing its zeros costs little."""
MOST = 0.5
"""Largest share of weights that are not 0 for which places and values are stored; a place takes as much as a value."""


def without_zeros_(model: Any) -> None:
    """Replace each float32 initializer of an ``onnx_ir`` model that is mostly 0 by its other values and their places, in place.

    ConstantOfShape, ScatterElements and Reshape compute the same bits from these; ONNX Runtime folds them into a constant
    when it loads the model, so that predictions take no longer. Draws of one mask share their places.
    """
    import onnx_ir as ir

    graph, nodes = model.graph, list[Any]()
    shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def constant(name: str, values: np.ndarray) -> Any:
        value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        graph.register_initializer(value)
        return value

    for name, value in list(graph.initializers.items()):
        dense = value.const_value.numpy()
        if dense.dtype != np.float32 or dense.size < LEAST:
            continue
        places = np.flatnonzero(dense)
        if len(places) > MOST * dense.size:
            continue
        key = (dense.shape, places.tobytes())
        if key not in shared:
            number = len(shared)
            zeros = ir.node("ConstantOfShape", [constant(f"size{number}", np.array([dense.size], np.int64))])
            nodes.append(zeros)
            shared[key] = (
                constant(f"places{number}", places.astype(np.int32 if dense.size < 2**31 else np.int64)),
                zeros.outputs[0],
                constant(f"shape{number}", np.array(dense.shape, np.int64)),
            )
        where, zero, shape = shared[key]
        kept = constant(f"{name}_kept", dense.reshape(-1)[places])
        placed = ir.node("ScatterElements", [zero, where, kept], attributes={"axis": 0})
        shaped = ir.node("Reshape", [placed.outputs[0], shape])
        nodes += [placed, shaped]
        value.replace_all_uses_with(shaped.outputs[0])
        del graph.initializers[name]
    if nodes:
        graph.insert_before(graph[0], nodes)
