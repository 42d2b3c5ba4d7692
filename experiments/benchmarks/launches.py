"""Question: how many kernels would a training step launch on a GPU, and how long does Python take to launch them?

The networks have the structure of resnet20, vgg11 and vit_tiny with few channels, and the images 8×8 pixels, so that on a
processor nearly all time is that of the host. Kernels are counted by the operations of torch that a step runs on the CPU,
and the kernels in Triton that it would launch; without Triton, those in torch take their place. The time is that of a step with
kernels in torch. Writes ``OUT/launches.csv`` and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.benchmarks.candidates import DENSITY, deterministic, ours, stock
from experiments.benchmarks.report import markdown, write
from experiments.benchmarks.timing import Step
from pyro_lottery import machine
from pyro_lottery.machine import channels_last
from pyro_lottery.nets.resnet import ResNet
from pyro_lottery.nets.vgg import VGG

try:
    from pyro_lottery.kernels import triton_path
except ImportError:  # Triton is there where torch was built for GPUs
    triton_path = None

PATHS = ("triton", "torch") if triton_path else ("torch",)
"""Kernels of a GPU that are counted."""
NARROW: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: ResNet((4, 4, 4), 3, 10, 3),
    "vgg11": lambda: VGG((4, "M", 4, "M", 4, 4, "M", 4, 4, "M", 4, 4), 10, 3),
    "vit_tiny": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, num_classes=10, embed_dim=12, num_heads=3
    ),
}  # fmt: skip
"""Networks of the structure that their name says, with few channels."""
OURS = {
    "our deterministic guide": ("point", 1.0),
    "one weight sample": ("weights", 1.0),
    f"one weight sample at {100 * DENSITY:g} %": ("weights", DENSITY),
    "local": ("local", 1.0),
}
COLUMNS = {
    "network": "{arch}", "step": "{candidate}", "kernels": "{launches}", "without Triton": "{torch}", "host ms": "{ms:.1f}",
    "ratio to det": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
STEPS = 10
"""Steps of a round."""
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")
"""Operations for which the host waits for a GPU."""

_NONE = {
    "as_strided", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_",
    "is_same_size", "_local_scalar_dense", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
_SEVERAL = {
    "logsumexp": 7, "constant_pad_nd": 2, "index_copy": 2, "native_layer_norm_backward": 3, "randperm": 6, "isfinite": 4,
    "nll_loss_backward": 2, "_scaled_dot_product_flash_attention_for_cpu_backward": 4, "max_pool2d_with_indices_backward": 2,
}  # fmt: skip
"""Kernels of operations that a GPU does with more than one."""
_AT_ONCE = {"cat": 128, "stack": 128, "foreach": 110}
"""Most tensors that one kernel takes."""


class Launches(TorchDispatchMode):
    """Counts the kernels that the operations within this context would launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        """Kernels by operation."""
        self.waits: Counter[str] = Counter()
        """Operations for which the host would wait."""

    @property
    def total(self) -> int:
        """All kernels."""
        return self.by_name.total()

    def __enter__(self) -> Launches:
        if triton_path:
            self._launch = triton_path._launch
            triton_path._launch = (
                self._count
            )  # without a GPU, they are not launched, so their results are not to be used
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if triton_path:
            triton_path._launch = self._launch

    def _count(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.by_name[kernel.__name__] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.by_name[name] += _launches(func, name, args)
        self.waits[name] += name in WAITS
        return func(*args, **(kwargs or {}))


def _launches(func: Any, name: str, args: Any) -> int:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    if (
        name in _NONE
        or not func._schema.name.startswith("aten::")
        or (aliases and not any(a.is_write for a in aliases))
    ):
        return 0  # it allocates, or returns a view
    if name == "convolution_backward":
        return sum(args[-1])
    if name.startswith("_fused_adam"):
        return _adam(args[0])
    if name in _AT_ONCE or name.startswith("_foreach"):
        return -(-len(args[0]) // _AT_ONCE.get(name, _AT_ONCE["foreach"]))
    return _SEVERAL.get(name, 1)


def _adam(parameters: Sequence[Tensor]) -> int:
    """The kernels of fused Adam: each takes 36 tensors, or 320 blocks of 65,536 numbers."""
    kernels = tensors = blocks = 0
    for parameter in parameters:
        tensors += 1
        for _ in range(max(1, -(-parameter.numel() // 65536))):
            blocks += 1
            if blocks == 320:
                kernels, blocks, tensors = kernels + 1, 0, 1
        if tensors == 36:
            kernels, tensors, blocks = kernels + 1, 0, 0
    return kernels + (blocks > 0)


def steps(arch: str, path: str, with_stock: bool = False) -> dict[str, Step]:
    """The steps that are compared, for two images of 8×8 pixels, with the kernels of ``path`` (triton or torch)."""
    x, y, make = channels_last(torch.randn(2, 3, 8, 8)), torch.randint(0, 10, (2,)), NARROW[arch]
    found = {"det": deterministic(make(), x, y, "32", plain=False)}
    for name, (estimator, density) in OURS.items():
        found[name] = ours(make(), x, y, "32", estimator, 1, path, density)
    return found | ({"stock Pyro": stock(make(), x, y, "32")} if with_stock else {})


def counted(step: Step) -> Launches:
    """The kernels of one step, which is not the first."""
    with Launches():
        step()
    with Launches() as launches:
        step()
    return launches


def host_seconds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Processor time of a step, in ``rounds`` rounds that go through all steps in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(STEPS):
                step()
            if turn >= 2:
                seconds[name].append((time.process_time() - began) / STEPS)
    return seconds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.launches", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(NARROW), choices=list(NARROW))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--by-operation", action="store_true", help="also print the kernels of each operation beyond those of det"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/launches"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, time, print and write."""
    given = parser().parse_args(arguments)
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    print(f"{machine.processor_name()}, one thread, torch {torch.__version__}, {platform.python_version()}\n")
    rows = list[dict[str, Any]]()
    for arch in given.arch:
        torch.manual_seed(0)
        kernels, alone = (
            {name: counted(step) for name, step in steps(arch, path, True).items()} for path in (PATHS[0], "torch")
        )
        every = steps(arch, "torch", with_stock=True)
        seconds = host_seconds(every, given.rounds)
        new = []
        for name, own in seconds.items():
            ratios = [a / b for a, b in zip(own, seconds["det"], strict=True)]
            new.append(
                {
                    "arch": arch, "candidate": name, "launches": kernels[name].total, "torch": alone[name].total, "waits": kernels[name].waits.total(),
                    "ms": 1000 * statistics.median(own), "ratio": statistics.median(ratios), "least": min(ratios),
                    "greatest": max(ratios),
                }
            )  # fmt: skip
        rows += new
        write(given.out / "launches.csv", rows)
        print(markdown(new, COLUMNS), end="\n\n", flush=True)
        for name in every if given.by_operation else ():
            more = Counter(kernels[name].by_name)
            more.subtract(kernels["det"].by_name)
            print(
                f"{name}: " + ", ".join(f"{operation} {count:+d}" for operation, count in more.most_common() if count)
            )


if __name__ == "__main__":
    main()
