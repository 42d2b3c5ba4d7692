"""The options of a run: one frozen dataclass, from whose fields the command line and ``config.json`` follow."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pyro_lottery import data, elbo, machine, priors, scores
from pyro_lottery.distributed import PARALLEL, STRATEGIES
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers.sparse_layers import CHOICES as SPARSE
from pyro_lottery.runs.options import AT_LEAST_0, AT_LEAST_1, FRACTION, HALF_OPEN, POSITIVE, RISING, checked, option
from pyro_lottery.runs.presets import PRESETS
from pyro_lottery.training.graph import CHOICES as GRAPH

RESUMABLE = {
    "levels", "data_dir", "run_dir", "device", "on_divergence", "deterministic", "pretrained", "pretrained_key",
    "level0_from", "sparse", "graph",
}  # fmt: skip
"""Options that may differ when a run is resumed. They do not change what a level is trained to, except for its last bits."""
EVIDENCE = "evidence"
"""The value of ``--prune-fraction`` that leaves the number of weights to the score."""
SCHEDULES = ("iterative", "one_shot", "gradual", "dynamic")
"""How density falls (``--schedule``)."""
MOVING = ("gradual", "dynamic")
"""Schedules that move the mask while level 0 trains."""
MASK_STAYS: dict[str, Any] = {"schedule": "iterative", "prune_to": None, "mask_every": None}
"""Options of a run that trains given tickets."""
WITHOUT_SCALE = ("deterministic", "mc_dropout")
"""Guides whose weights have no scale."""
AFTER_LEVEL_0 = {"levels", "score", "prune_fraction", "rewind"}
"""Options that level 0 does not depend on, if no schedule moves its mask by the score; ``epoch:K`` and ``restart:K`` of ``rewind`` also save
the rewind point."""
LATER: dict[str, Any] = {"prune_to": None, "sparse": "off", "graph": "off", "schedule": "iterative", "mask_every": None}
"""Options added after version 0.1.0, with the values that stand for its behaviour."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run; raises ``UserError`` for a bad value. The defaults are the paper's except ``train_samples``."""

    arch: str = option(
        "resnet18", str,
        "network: a name from pyro_lottery.list_models(), timm:NAME, or package.module:function; the function is called with "
        "those of num_classes, in_channels and image_size that it takes",
    )  # fmt: skip
    patch_size: int | None = option(
        None, int, "patch size of a ViT in pixels; default: an eighth of the image", AT_LEAST_1
    )
    pretrained: str | None = option(
        None, str, "file with a state_dict that the network starts from; default: random initial values"
    )
    pretrained_key: str | None = option(
        None, str,
        "key of the state_dict in a --pretrained file that has several, such as state_dict_ema; default: common names",
    )  # fmt: skip
    dataset: str = option("cifar10", str, "data set", choices=data.list_datasets())
    data_dir: str = option("data", str, "folder for downloads, or the folder with train/ and test/")
    image_size: int | None = option(
        None, int, "size N of the images: their shorter side is resized to N pixels, then the centre is cropped to N×N; default: "
        "no resizing", (lambda v: v in data.SIDES, f"from {data.SIDES[0]} to {data.SIDES[-1]}"),
    )  # fmt: skip
    train_size: int | None = option(None, int, "number of training images, stratified; default: all", AT_LEAST_1)
    test_size: int | None = option(None, int, "number of test images, stratified; default: all", AT_LEAST_1)
    val_fraction: float = option(
        0.0, float, "fraction of the training images held out for validation, stratified", HALF_OPEN
    )
    augment: str = option("auto", str, "random crop and flip of training images", choices=("auto", *data.AUGMENTATIONS))
    guide: str = option(
        "mean_field", str,
        "the posterior: mean_field; ivon, which trains it by natural gradients; deterministic; mc_dropout; laplace, swag, sgld and sghmc, which train a point and find its "
        "scales at its end; or the import path of a Pyro AutoGuide. --posterior is another name of this option", also=("posterior",),
    )  # fmt: skip
    prior: str = option(
        "normal", str, f"{', '.join(priors.KINDS)}, or the import path of (site, shape) -> distribution"
    )
    prior_scale: float = option(1.0, float, "scale of the prior", POSITIVE)
    score: str = option(
        "snr", str,
        f"score that ranks weights for pruning: {', '.join(scores.SCORES)}, or an import path; with deterministic and mc_dropout, which have no scale, snr means magnitude",
    )  # fmt: skip
    schedule: str = option(
        "iterative", str, "how density falls: iterative (--levels prunings, each followed by a training); one_shot (one pruning of the trained "
        "dense network to --prune-to); gradual (level 0 starts dense and is pruned to --prune-to while it trains); dynamic (level 0 has "
        "density --prune-to from the start, and exchanges its lowest weights by --score for those of the largest gradient)",
        choices=SCHEDULES,
    )  # fmt: skip
    mask_every: int | None = option(
        None, int, "steps between two changes of the mask of --schedule gradual or dynamic; default: 100, or a tenth of a training of fewer than 1,000 steps",
        AT_LEAST_1,
    )  # fmt: skip
    levels: int = option(
        None, int, "number of prunings; level 0 is dense, so N levels need N + 1 trainings; default: 20, and 1 with --schedule one_shot. With --schedule gradual "
        "or dynamic, 1 trains the ticket that level 0 has found once more, and the default is 0", AT_LEAST_0,
    )  # fmt: skip
    prune_fraction: float | str = option(
        0.2, float,
        "fraction of the remaining weights that each level prunes; or evidence: all that the score says are worth nothing, until a "
        "level has none",
        FRACTION, words=(EVIDENCE,),
    )  # fmt: skip
    prune_to: float | None = option(
        None,
        float,
        "density of the last level; sets --prune-fraction to 1 - density^(1/levels), to six digits, where --schedule is iterative",
        FRACTION,
    )
    rewind: str = option(
        "init", str,
        "values that a ticket starts from: init; epoch:K (level 0 after K epochs, training epochs K + 1 to the last); "
        "restart:K (the same values, training all epochs); or lr (the trained values of the level before, training all epochs)",
        (
            lambda v: bool(re.fullmatch(r"init|lr|(epoch|restart):[1-9]\d{0,8}", v)),
            "init, lr, epoch:K or restart:K with K at least 1",
        ),
    )  # fmt: skip
    epochs: int = option(160, int, "epochs per level", AT_LEAST_1)
    batch_size: int = option(128, int, "images per batch", AT_LEAST_1)
    lr: float = option(1e-3, float, "learning rate of Adam", POSITIVE)
    milestones: tuple[int, ...] = option(
        (80, 120), int, "epochs after which the learning rate is divided by 10", RISING, many=True
    )
    warmup_epochs: int = option(0, int, "epochs over which the learning rate rises from 0", AT_LEAST_0)
    weight_decay: float = option(
        1e-4, float, "L2 penalty in Adam's gradient, on locs and network parameters", AT_LEAST_0
    )
    kl_temperature: float = option(0.1, float, "factor T of the KL divergence in the loss", POSITIVE)
    kl_warmup_epochs: int = option(
        0, int, "epochs K over which the KL factor rises from 0 to T: it is T * (e + 1/2) / K in epochs e = 0, ..., K - 1",
        AT_LEAST_0,
    )  # fmt: skip
    kl: str = option(
        "analytic", str, "KL divergence in closed form where one exists, or always by sampling", choices=elbo.KL_KINDS
    )
    init_scale: float = option(0.01, float, "initial scale as a fraction of the layer's Kaiming scale", POSITIVE)
    estimator: str = option(
        "weights", str, "where noise is added: to the weights, or to the outputs of layers (local)",
        choices=elbo.ESTIMATORS,
    )  # fmt: skip
    train_samples: int = option(1, int, "weight samples per training batch; the paper uses 10", AT_LEAST_1)
    eval_samples: int = option(10, int, "posterior samples per prediction at a level's end", AT_LEAST_1)
    history_samples: int | None = option(
        None, int, "posterior samples per prediction after each epoch; default: the smaller of --train-samples and --eval-samples",
        AT_LEAST_1,
    )  # fmt: skip
    device: str = option("auto", str, "auto, cpu, cuda or cuda:N")
    devices: int = option(1, int, "devices per node that train one network together", AT_LEAST_1)
    num_nodes: int = option(1, int, "nodes that train one network together", AT_LEAST_1)
    strategy: str = option("ddp", str, "how several devices train together", choices=STRATEGIES)
    parallel: str = option(
        "data", str, "what several devices divide: the images of a batch (data), or its weight samples (samples), where "
        "each device has all images, cropped and flipped for itself", choices=PARALLEL,
    )  # fmt: skip
    sync_batchnorm: bool = option(False, bool, "BatchNorm over the images of all GPUs instead of each GPU's own")
    precision: str = option(
        "32", str, "32 (float32), tf32 (convolutions and matrix products of a GPU with factors of 10 bits), bf16 (autocast), or auto: bf16 "
        "on a GPU that supports it; on a CPU the faster of 32 and bf16, which is measured once for each network and batch size", choices=(*machine.PRECISIONS, "auto"),
    )  # fmt: skip
    sparse: str = option(
        "auto", str, "pruned layers at the cost of their surviving weights, in float32 on the CPU: auto (where that is faster), "
        "on or off", choices=SPARSE,
    )  # fmt: skip
    graph: str = option(
        "auto", str, "training steps as a CUDA graph, recorded once and replayed, so that a GPU does not wait for Python: auto (on "
        "one GPU), on or off", choices=GRAPH,
    )  # fmt: skip
    deterministic: bool = option(
        False, bool, "on a GPU, use only algorithms that give the same bits every time; training on a CPU always does"
    )
    on_divergence: str = option(
        "stop", str, "when the loss is not finite: stop, or retry the level once with half the learning rate",
        choices=("stop", "retry"),
    )  # fmt: skip
    seed: int = option(0, int, "seed of every random stream", AT_LEAST_0)
    level0_from: str | None = option(
        None, str,
        "run folder whose level 0 is copied instead of trained; it may differ from this run in score (not with --schedule gradual or "
        "dynamic), prune fraction, levels and rewind alone, and must have been trained with the same versions on the same hardware",
    )  # fmt: skip
    run_dir: str | None = option(
        None, str,
        "run folder; default: runs/NAME, where NAME lists the main options and those that differ from the defaults",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f, getattr(self, f.name)))
        if self.pretrained_key is not None and self.pretrained is None:
            raise UserError(
                "--pretrained-key is the key of a state_dict in the file of --pretrained; give --pretrained too"
            )
        if self.kl_warmup_epochs >= self.epochs:
            raise UserError(
                f"--kl-warmup-epochs {self.kl_warmup_epochs} leaves none of {self.epochs} epochs at the full --kl-temperature; "
                "choose fewer warm-up epochs"
            )
        if self.rewind_epoch > self.epochs:
            raise UserError(
                f"--rewind {self.rewind} is after the last of {self.epochs} epochs; choose an earlier epoch"
            )
        if self.epochs_of(1) == 0:
            raise UserError(
                f"--rewind {self.rewind} leaves none of {self.epochs} epochs to train; choose an earlier epoch"
            )
        self._settle_schedule()
        if self.prune_to is not None and self.schedule == "iterative":
            if self.levels == 0:
                raise UserError(f"--prune-to {self.prune_to:g} needs --levels of at least 1")
            if isinstance(self.prune_fraction, str):
                raise UserError(
                    f"--prune-fraction {self.prune_fraction} chooses the density itself; leave out --prune-to"
                )
            fraction = float(f"{1 - self.prune_to ** (1 / self.levels):.6g}")
            object.__setattr__(self, "prune_fraction", fraction)
            object.__setattr__(self, "prune_to", None)  # so that equal runs have equal options
        if self.guide in WITHOUT_SCALE and self.score == "snr":
            object.__setattr__(self, "score", "magnitude")  # |μ|/σ has no σ here, which leaves |w|
        if self.history_samples is None:
            object.__setattr__(self, "history_samples", min(self.train_samples, self.eval_samples))
        if self.run_dir is None:
            object.__setattr__(self, "run_dir", str(Path("runs") / self.name()))

    def _settle_schedule(self) -> None:
        """Give ``levels`` its default, and check what belongs to ``--schedule``. Equal runs then have equal options."""
        usual = {f.name: f.default for f in fields(self)}
        if self.levels is None:
            object.__setattr__(self, "levels", {"iterative": 20, "one_shot": 1}.get(self.schedule, 0))
        if self.mask_every is not None and self.schedule not in MOVING:
            raise UserError(
                f"--mask-every is for --schedule {' and '.join(MOVING)}, whose masks change while a network trains"
            )
        if self.schedule == "iterative":
            return
        if self.prune_to is None:
            raise UserError(f"--schedule {self.schedule} needs --prune-to, the density that it ends with")
        if self.prune_fraction != usual["prune_fraction"]:
            raise UserError(f"--schedule {self.schedule} prunes to --prune-to; leave out --prune-fraction")
        possible = (1,) if self.schedule == "one_shot" else (0, 1)
        if self.levels not in possible:
            raise UserError(
                f"--levels must be {' or '.join(map(str, possible))} with --schedule {self.schedule}, got {self.levels}"
            )
        if self.schedule == "one_shot":  # a single level of iterative pruning, which may share its level 0
            object.__setattr__(self, "schedule", "iterative")
            return
        if self.devices * self.num_nodes > 1:
            raise UserError(
                f"--schedule {self.schedule} trains on one device, got --devices {self.devices} --num-nodes {self.num_nodes}"
            )
        if self.schedule == "dynamic" and self.rewind_epoch:
            raise UserError(
                f"--rewind {self.rewind} has no values for weights that --schedule dynamic adds later; use init or lr"
            )

    @property
    def rewind_epoch(self) -> int:
        """K of ``--rewind epoch:K`` or ``restart:K``, otherwise 0."""
        return int(self.rewind.partition(":")[2] or 0)

    def first_epoch(self, level: int) -> int:
        """The epoch, counted from 0, at which ``level`` starts: K with ``--rewind epoch:K`` after level 0, otherwise 0.

        Such a level trains epochs K + 1 to the last, with their learning rates and random streams (Frankle et al. 2020,
        Linear Mode Connectivity and the Lottery Ticket Hypothesis).
        """
        return self.rewind_epoch if level and self.rewind.startswith("epoch:") else 0

    def epochs_of(self, level: int) -> int:
        """Number of epochs that ``level`` trains, which is the number of rows of its history."""
        return self.epochs - self.first_epoch(level)

    @property
    def data_name(self) -> str:
        """The name of the data in titles; for a folder of images, the folder's name.

        >>> Config(dataset="folder", data_dir="data/cifar10-jpeg").data_name, Config().data_name
        ('CIFAR-10 (JPEG)', 'CIFAR-10')
        """
        return data.title(self.dataset, self.data_dir, self.image_size)

    def with_weights(self, checksum: str) -> Config:
        """This config with the checksum of the ``--pretrained`` weights in ``run_dir``, if ``run_dir`` is the default."""
        usual = Path("runs") / self.name()
        return replace(self, run_dir=f"{usual}-{checksum}") if Path(str(self.run_dir)) == usual else self

    def name(self) -> str:
        """A readable name, different for different runs: the main options, the closest preset, and the options that differ.

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

        # A run of the fast preset is named by its prune fraction, as every run with that fraction is.
        base = min((name for name in PRESETS if name != "fast"), key=lambda name: len(differing(name)))
        parts = [self.arch, self.dataset, self.guide, self.score, f"seed{self.seed}"]
        parts += [base] if base != "default" else []
        given = (self.pretrained and Path(self.pretrained).stem, self.pretrained_key)
        parts += ["-".join(["pretrained", *filter(None, given)])] if self.pretrained else []
        for name in differing(base):
            value = getattr(self, name)
            parts.append(f"{name}{'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return re.sub(r"[^\w.+-]", "_", "-".join(parts))

    @property
    def pruned(self) -> str:
        """How many weights a level prunes, in words.

        >>> Config().pruned, Config(prune_fraction="evidence").pruned, Config(schedule="gradual", prune_to=0.05).pruned
        ('20 % pruned a level', 'pruned by evidence', 'pruned to 5 % while it trained (gradual)')
        """
        if self.prune_to is not None:
            return f"pruned to {100 * self.prune_to:g} % while it trained ({self.schedule})"
        if isinstance(self.prune_fraction, str):
            return f"pruned by {self.prune_fraction}"
        return f"{100 * self.prune_fraction:g} % pruned a level"

    def options(self) -> dict[str, Any]:
        """All options by name, as values that JSON can hold."""
        return asdict(self)


def of_transplants(config: Config, run_dir: str, /, **options: Any) -> Config:
    """The options of transplants from a deterministic run with ``config``, some replaced by ``options``.

    >>> of_transplants(preset("quick", arch="lenet", guide="deterministic"), "runs/a/transplant").guide
    'mean_field'
    """
    own = {"guide": "mean_field", "device": "auto", "run_dir": run_dir}
    # A ticket holds all values, and is not the dense one.
    own |= {"pretrained": None, "pretrained_key": None, "level0_from": None, **MASK_STAYS}  # type: ignore[dict-item]
    if config.history_samples == min(config.train_samples, config.eval_samples):
        own["history_samples"] = None  # type: ignore[assignment]  # the usual number, which follows from the transplants' own options
    return replace(config, **own | options)  # type: ignore[arg-type]


def preset(name: str, **options: Any) -> Config:
    """The options of a preset, some replaced by ``options``; raises ``UserError`` for an unknown ``name`` or a bad value.

    >>> preset("quick", arch="lenet").levels
    2
    """
    if name not in PRESETS:
        raise unknown("--preset", name, PRESETS)
    chosen = PRESETS[name]
    if options.get("schedule", "iterative") != "iterative":  # which has its own number of levels
        chosen = {n: value for n, value in chosen.items() if n not in ("levels", "prune_fraction")}
    return Config(**(chosen | options))


def from_json(options: dict[str, Any]) -> Config:
    """The options in a ``config.json``; ignores its facts. Raises ``UserError`` if an option is missing or has a bad value."""
    known = {f.name for f in fields(Config)}
    if missing := sorted(known - options.keys() - LATER.keys() - RESUMABLE - {"run_dir"}):
        raise UserError(f"config.json has no option {missing[0]}; restore the file, or choose another --run-dir")
    try:
        return Config(**{name: value for name, value in options.items() if name in known})
    except TypeError as error:
        raise UserError(
            f"config.json has an option of a wrong type ({error}); restore the file, or choose another --run-dir"
        ) from error
