import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from pyro_lottery.exports.sparse_onnx import without_zeros_


def written(net, path, sparse):
    found = torch.onnx.export(net.eval(), (torch.zeros(2, 40),), dynamo=True, verbose=False)
    if sparse:
        without_zeros_(found.model)
    found.save(path)
    return onnxruntime.InferenceSession(path), path.stat().st_size


@pytest.mark.filterwarnings("ignore")
def test_the_same_bits_from_a_file_without_zeros(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100))
    with torch.no_grad():
        net[2].weight.mul_(torch.rand(100, 100) < 0.05)
        net[4].weight.mul_(net[2].weight != 0)  # the same places
    x = np.random.default_rng(0).standard_normal((2, 40), dtype=np.float32)
    (dense, large), (sparse, small) = (written(net, tmp_path / f"{s}.onnx", s) for s in (False, True))
    name = dense.get_inputs()[0].name
    np.testing.assert_array_equal(dense.run(None, {name: x})[0], sparse.run(None, {name: x})[0])
    kept = int((net[2].weight != 0).sum())
    # 80,000 bytes of two matrices become a place of 4 bytes and two values of 4 bytes for each weight; and a little more.
    assert large - 80_000 + 12 * kept < small < large - 80_000 + 12 * kept + 2000
    model = ir.load(tmp_path / "True.onnx")
    assert [node.op_type for node in model.graph][:5] == [
        "ConstantOfShape",
        "ScatterElements",
        "Reshape",
        "ScatterElements",
        "Reshape",
    ]
    assert sum(name.startswith("places") for name in model.graph.initializers) == 1
