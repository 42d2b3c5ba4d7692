"""The options: one frozen dataclass whose fields are the command line, the saved config and the API's keywords."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pyro_lottery import data, elbo, machine, priors
from pyro_lottery.distributed import PARALLEL, STRATEGIES
from pyro_lottery.errors import UserError, unknown

RESUMABLE = {
    "levels", "data_dir", "run_dir", "device", "on_divergence", "deterministic", "pretrained", "pretrained_key",
}  # fmt: skip
"""Options that may differ when a run is resumed: they say how far, where and how carefully, not what."""
LATER: dict[str, Any] = {}
"""Options that came after version 0.1.0, with the values that its runs had."""
Check = tuple[Callable[[Any], bool], str]
_POSITIVE: Check = (lambda v: v > 0, "greater than 0")
_AT_LEAST_1: Check = (lambda v: v >= 1, "at least 1")
_AT_LEAST_0: Check = (lambda v: v >= 0, "at least 0")
_FRACTION: Check = (lambda v: 0 < v < 1, "between 0 and 1, both excluded")
_HALF_OPEN: Check = (lambda v: 0 <= v < 1, "from 0 to below 1")
_RISING: Check = (lambda v: all(a >= 1 for a in v) and list(v) == sorted(set(v)), "rising epochs, each at least 1")


def _option(
    default: Any,
    kind: type,
    text: str,
    check: Check | None = None,
    choices: Sequence[str] | None = None,
    many: bool = False,
) -> Any:
    return field(
        default=default, metadata={"kind": kind, "help": text, "check": check, "choices": choices, "many": many}
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every option of a run; bad values raise ``UserError``. The defaults are the paper's but for ``train_samples``."""

    arch: str = _option(
        "resnet18", str,
        "network: see pyro_lottery.list_models(), timm:NAME, or package.module:function, which is called with those of "
        "num_classes, in_channels and image_size that it takes",
    )  # fmt: skip
    patch_size: int | None = _option(None, int, "patch size of a ViT; default: an eighth of the image", _AT_LEAST_1)
    pretrained: str | None = _option(
        None, str, "file with a state_dict that the network starts from; default: random initial values"
    )
    pretrained_key: str | None = _option(
        None, str, "the state_dict in a --pretrained file with several, state_dict_ema say; default: by usual names"
    )
    dataset: str = _option("cifar10", str, "data set", choices=data.list_datasets())
    data_dir: str = _option("data", str, "where downloads go, or the folder with train/ and test/")
    image_size: int | None = _option(
        None, int, "side N of the images: the shorter one is resized to N pixels and the centre cut out, N by N; default: "
        "as they are", (lambda v: v in data.SIDES, f"from {data.SIDES[0]} to {data.SIDES[-1]}"),
    )  # fmt: skip
    train_size: int | None = _option(None, int, "training images to use, stratified; default: all", _AT_LEAST_1)
    test_size: int | None = _option(None, int, "test images to use, stratified; default: all", _AT_LEAST_1)
    val_fraction: float = _option(0.0, float, "share of the training images to hold out, stratified", _HALF_OPEN)
    augment: str = _option(
        "auto", str, "random crop and flip of training images", choices=("auto", *data.AUGMENTATIONS)
    )
    guide: str = _option("mean_field", str, "mean_field, deterministic, or the import path of a Pyro AutoGuide")
    prior: str = _option(
        "normal", str, f"{', '.join(priors.KINDS)}, or the import path of (site, shape) -> distribution"
    )
    prior_scale: float = _option(1.0, float, "scale of the prior", _POSITIVE)
    score: str = _option(
        "snr", str,
        "what ranks weights: snr, magnitude, squared_sum, mean_over_variance, squared_sum_log_scale, random, or an "
        "import path; a deterministic guide has no scale, and snr then means magnitude",
    )  # fmt: skip
    levels: int = _option(20, int, "prunings; level 0 is dense, so N levels make N + 1 trainings", _AT_LEAST_0)
    prune_fraction: float = _option(0.2, float, "share of the surviving weights that a level prunes", _FRACTION)
    rewind: str = _option(
        "init", str,
        "init; epoch:K (go on from level 0's values after K epochs, at epoch K of the schedule); restart:K (from the same "
        "values, the whole schedule anew); or lr (keep trained values, the whole schedule anew)",
        (
            lambda v: bool(re.fullmatch(r"init|lr|(epoch|restart):[1-9]\d{0,8}", v)),
            "init, lr, epoch:K or restart:K with K at least 1",
        ),
    )  # fmt: skip
    epochs: int = _option(160, int, "epochs per level", _AT_LEAST_1)
    batch_size: int = _option(128, int, "images per batch", _AT_LEAST_1)
    lr: float = _option(1e-3, float, "Adam's learning rate", _POSITIVE)
    milestones: tuple[int, ...] = _option(
        (80, 120), int, "epochs after which the rate falls to a tenth", _RISING, many=True
    )
    warmup_epochs: int = _option(0, int, "epochs over which the rate rises from 0", _AT_LEAST_0)
    weight_decay: float = _option(1e-4, float, "L2 in Adam's gradient, on locs and network parameters", _AT_LEAST_0)
    kl_temperature: float = _option(0.1, float, "factor T of the KL divergence", _POSITIVE)
    kl_warmup_epochs: int = _option(
        0, int, "epochs K over which the KL's factor rises from 0 to T: it is T * (e + 1/2) / K in epochs e = 0, ..., K - 1",
        _AT_LEAST_0,
    )  # fmt: skip
    kl: str = _option(
        "analytic", str, "KL by closed form where there is one, or always by sampling", choices=elbo.KL_KINDS
    )
    init_scale: float = _option(0.01, float, "initial scale as a fraction of the layer's Kaiming scale", _POSITIVE)
    estimator: str = _option(
        "weights", str, "where noise enters: the weights, or locally what layers compute", choices=elbo.ESTIMATORS
    )
    train_samples: int = _option(1, int, "noise samples per training batch; the paper has 10", _AT_LEAST_1)
    eval_samples: int = _option(10, int, "posterior samples per prediction at a level's end", _AT_LEAST_1)
    history_samples: int | None = _option(
        None, int, "posterior samples for the test accuracy of every epoch; default: the smaller of the two above",
        _AT_LEAST_1,
    )  # fmt: skip
    device: str = _option("auto", str, "auto, cpu, cuda or cuda:N")
    devices: int = _option(
        1, int, "devices per node that train one network together, each a part of every batch", _AT_LEAST_1
    )
    num_nodes: int = _option(1, int, "nodes that train one network together", _AT_LEAST_1)
    strategy: str = _option("ddp", str, "how several devices train together", choices=STRATEGIES)
    parallel: str = _option(
        "data", str, "what several devices divide: data, the images of a batch, or samples, with all images on each and "
        "weight noise of its own", choices=PARALLEL,
    )  # fmt: skip
    sync_batchnorm: bool = _option(False, bool, "normalise by all GPUs' images instead of each GPU's own")
    precision: str = _option(
        "32", str, "32, bf16 autocast, or auto: bf16 where the device has it", choices=(*machine.PRECISIONS, "auto")
    )
    deterministic: bool = _option(
        False, bool, "on a GPU, train by algorithms that give the same bits every time; a processor does so anyway"
    )
    on_divergence: str = _option(
        "stop", str, "when a loss is not finite: stop, or retry the level once with half the learning rate",
        choices=("stop", "retry"),
    )  # fmt: skip
    seed: int = _option(0, int, "seed of every random stream", _AT_LEAST_0)
    run_dir: str | None = _option(None, str, "run folder; default: runs/ and the options that differ from the defaults")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if value is None and f.default is None:
                continue
            try:
                value = tuple(_typed(v, meta["kind"]) for v in value) if meta["many"] else _typed(value, meta["kind"])
            except (TypeError, ValueError, OverflowError):
                expected = f"{'a list of ' if meta['many'] else ''}{_KINDS[meta['kind']]}"
                raise UserError(f"--{dashed(f.name)} must be {expected}, got {value!r}") from None
            object.__setattr__(self, f.name, value)
            if meta["choices"] and value not in meta["choices"] and (f.name, value) != ("dataset", data.OWN):
                raise unknown(f"--{dashed(f.name)}", str(value), meta["choices"])
            if meta["check"] and not meta["check"][0](value):
                raise UserError(f"--{dashed(f.name)} must be {meta['check'][1]}, got {as_text(value)}")
        if self.pretrained_key is not None and self.pretrained is None:
            raise UserError("--pretrained-key names a state_dict in the file of --pretrained; give that too")
        if self.kl_warmup_epochs >= self.epochs:
            raise UserError(
                f"--kl-warmup-epochs {self.kl_warmup_epochs} leaves none of {self.epochs} epochs at the full --kl-temperature; "
                "choose fewer"
            )
        if self.rewind_epoch > self.epochs:
            raise UserError(f"--rewind {self.rewind} is after the last of {self.epochs} epochs")
        if self.epochs_of(1) == 0:
            raise UserError(
                f"--rewind {self.rewind} leaves none of {self.epochs} epochs to train; choose an earlier one"
            )
        if self.guide == "deterministic" and self.score == "snr":
            object.__setattr__(self, "score", "magnitude")  # |w| is what remains of |μ|/σ without a σ
        if self.history_samples is None:
            object.__setattr__(self, "history_samples", min(self.train_samples, self.eval_samples))
        if self.run_dir is None:
            object.__setattr__(self, "run_dir", str(Path("runs") / self.name()))

    @property
    def rewind_epoch(self) -> int:
        """K of ``--rewind epoch:K`` or ``restart:K``, else 0."""
        return int(self.rewind.partition(":")[2] or 0)

    def first_epoch(self, level: int) -> int:
        """The epoch, counted from 0, at which ``level`` begins to train: K with ``--rewind epoch:K``, 0 for level 0.

        A later level then trains the epochs K+1 to the last, with their learning rates and random streams (Frankle et
        al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis).
        """
        return self.rewind_epoch if level and self.rewind.startswith("epoch:") else 0

    def epochs_of(self, level: int) -> int:
        """How many epochs ``level`` trains: the rows of its history."""
        return self.epochs - self.first_epoch(level)

    @property
    def data_name(self) -> str:
        """What to call the data in a title; a folder of images by its own name.

        >>> Config(dataset="folder", data_dir="data/cifar10-jpeg").data_name, Config().data_name
        ('CIFAR-10 (JPEG)', 'CIFAR-10')
        """
        return data.title(self.dataset, self.data_dir, self.image_size)

    def with_weights(self, checksum: str) -> Config:
        """The same with a default ``run_dir`` that names the weights of ``pretrained`` by their checksum."""
        usual = Path("runs") / self.name()
        return replace(self, run_dir=f"{usual}-{checksum}") if Path(str(self.run_dir)) == usual else self

    def name(self) -> str:
        """A readable name that no two different runs share: the main options, the preset, and what differs from it.

        >>> Config(arch="resnet20", epochs=5, milestones=(3, 4)).name()
        'resnet20-cifar10-mean_field-snr-seed0-epochs5-milestones3+4'
        >>> preset("quick", arch="lenet", lr=0.01).name()
        'lenet-digits-mean_field-snr-seed0-quick-lr0.01'
        """
        main = ("arch", "dataset", "guide", "score", "seed")
        hidden = {*main, *RESUMABLE}
        usual = {f.name: f.default for f in fields(self)}
        usual["history_samples"] = min(self.train_samples, self.eval_samples)

        def differing(base: str) -> list[str]:
            expected = usual | PRESETS[base]
            return [f.name for f in fields(self) if f.name not in hidden and getattr(self, f.name) != expected[f.name]]

        base = min(PRESETS, key=lambda name: len(differing(name)))
        parts = [self.arch, self.dataset, self.guide, self.score, f"seed{self.seed}"]
        parts += [base] if base != "default" else []
        given = (self.pretrained and Path(self.pretrained).stem, self.pretrained_key)
        parts += ["-".join(["pretrained", *filter(None, given)])] if self.pretrained else []
        for name in differing(base):
            value = getattr(self, name)
            parts.append(f"{name}{'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return re.sub(r"[^\w.+-]", "_", "-".join(parts))

    def options(self) -> dict[str, Any]:
        """All options as plain values for JSON."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"train_samples": 10},
    "reduced": {
        "train_size": 2000, "test_size": 1000, "batch_size": 50, "epochs": 10, "milestones": (5, 8),
        "levels": 5, "prune_fraction": 0.6,
    },
    "minimal": {
        "train_size": 1000, "test_size": 500, "batch_size": 25, "epochs": 8, "milestones": (4, 6),
        "levels": 5, "prune_fraction": 0.6,
    },
    "quick": {
        "dataset": "digits", "levels": 2, "prune_fraction": 0.5, "epochs": 4, "milestones": (3,), "batch_size": 64,
    },
    "smoke": {
        "dataset": "digits", "train_size": 60, "test_size": 60, "batch_size": 30, "epochs": 1, "milestones": (),
        "levels": 2, "prune_fraction": 0.6, "eval_samples": 2,
    },
}  # fmt: skip
"""Named changes of the defaults. ``paper`` is the paper's protocol. ``reduced`` and ``minimal`` end at about its density
(1.0 %) in a few levels of a few epochs on a few images: hours on two CPU cores. ``quick`` takes minutes, ``smoke`` seconds.

The defaults are the paper's but for one weight sample a batch instead of ten, with which a network learns far more in
the same time (experiments/benchmarks/estimators.py).
"""
PRESET_HELP = (
    "default; paper: its ten weight samples; reduced, minimal: hours on two cores; quick: minutes; smoke: seconds"
)


def preset(name: str, **options: Any) -> Config:
    """The options of a preset, with ``options`` replacing some of them; raises ``UserError`` if ``name`` is unknown.

    >>> preset("quick", arch="lenet").levels
    2
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return Config(**(PRESETS[name] | options))


def from_json(options: dict[str, Any]) -> Config:
    """The options of a saved ``config.json``, whatever else it holds."""
    known = {f.name for f in fields(Config)}
    if missing := sorted(known - options.keys() - LATER.keys() - RESUMABLE - {"run_dir"}):
        raise UserError(f"the saved options lack {missing[0]}")
    try:
        return Config(**{name: value for name, value in options.items() if name in known})
    except TypeError as error:
        raise UserError(f"the saved options are of the wrong type ({error})") from error


_KINDS = {
    int: "a whole number", float: "a number of usual size", bool: "True or False", str: "text without control characters",
}  # fmt: skip


def _typed(value: Any, kind: type) -> Any:
    """``value`` as ``kind``; ``TypeError`` or ``ValueError`` if it is not one, as a saved or foreign config may hold."""
    if kind is str:
        if not isinstance(value, str) or any(c < " " for c in value):
            raise TypeError
        value.encode()  # fails for the undecodable bytes of a broken file name
    elif kind is bool:
        if not isinstance(value, bool):
            raise TypeError
    elif isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise TypeError
    elif not -(2**63) < float(value) < 2**63:  # neither a NaN nor a number too large for torch
        raise ValueError
    return kind(value)


def dashed(name: str) -> str:
    """An option as the command line spells it."""
    return name.replace("_", "-")


def as_text(value: Any) -> str:
    """An option's value as the command line spells it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
