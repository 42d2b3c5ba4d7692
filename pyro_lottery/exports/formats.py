"""Graphs in files of ONNX and of torch.export, with facts about them as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lottery import files
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.exports.predictor import Predictor, checked
from pyro_lottery.exports.sparse_onnx import without_zeros_

KEY = "pyro_lottery"
"""Name of the facts in a file."""
INPUT = "images"
NEEDS = "--format onnx needs onnx, onnxscript and onnxruntime: pip install 'pyro-lottery[export]'"


def check_installed(format: str) -> None:
    """Raise ``UserError`` if a package that ``format`` needs is missing."""
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"{NEEDS} ({error.name} is missing)") from error


def save_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``program`` as ONNX; raises ``UserError`` if it holds an operation that ONNX lacks."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        try:
            found: Any = torch.onnx.export(
                program, input_names=[INPUT], output_names=facts["outputs"], dynamo=True, verbose=False
            )
        except Exception as error:  # the exporter raises errors of its own and of what it calls
            raise UserError(f"this network cannot be written as ONNX ({one_line(error)}); use --format pt2") from error
    for node in found.model.graph:  # where its code is on this machine
        node.metadata_props.clear()
        node.doc_string = None
    without_zeros_(found.model)
    found.model.metadata_props[KEY] = json.dumps(facts)
    try:
        content = found.model_proto.SerializeToString()
    except Exception as error:  # of protobuf, whose messages end at 2 GiB
        raise UserError(f"this network is too large for one ONNX file ({one_line(error)}); use --format pt2") from error
    files.write_atomic(path, content)


def save_pt2(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``program`` as an archive of torch.export."""
    for node in program.graph.nodes:  # where its code is on this machine
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(name, None)
    content = io.BytesIO()  # a full disk under torch's own writer ends the process
    with warnings.catch_warnings(action="ignore"):  # of tensors that share memory, which are written once
        torch.export.save(program, content, extra_files={KEY: json.dumps(facts)})
    files.write_atomic(path, content.getvalue())


class GraphPredictor(Predictor):
    """An exported network in torch: the interface of ``Predictor`` for a folder with ``model.pt2``."""

    def __init__(self, folder: str | Path):
        """Open ``FOLDER/model.pt2``, a program; raises ``ValueError`` if it is not an export or is damaged."""
        path, extra = Path(folder) / "model.pt2", {KEY: ""}
        try:
            with warnings.catch_warnings(action="ignore"):  # torch 2.11 warns of its own read-only buffers
                module = torch.export.load(path, extra_files=extra).module()
            facts = json.loads(extra[KEY])
        except Exception as error:  # of zip files, pickles and programs
            raise ValueError(f"{path} is not an export of pyro_lottery ({one_line(error)})") from error
        self.facts = checked(facts, path)

        def run(images: np.ndarray) -> list[np.ndarray]:
            with torch.no_grad():
                return [value.numpy() for value in module(torch.from_numpy(np.ascontiguousarray(images)))]

        self._run = run


GRAPHS: dict[str, tuple[str, Any, Callable[[Path], Predictor]]] = {
    "onnx": ("model.onnx", save_onnx, Predictor),
    "pt2": ("model.pt2", save_pt2, GraphPredictor),
}
"""For each format of graphs: the file's name, the function that writes it, and the predictor that reads its folder."""
