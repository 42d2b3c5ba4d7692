"""The model card of an export: a README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.exports.state_dicts import LAYOUTS
from pyro_lottery.runs.folder import TICKETS_OF_RUN
from pyro_lottery.runs.trained import named_code
from pyro_lottery.tickets import CONTROLS

if TYPE_CHECKING:
    from pyro_lottery.runs.loaded import Level, Run

CITATION = r"""@article{kuhn2026bayesian,
  title = {Bayesian Lottery Ticket Hypothesis},
  author = {Kuhn and Weyrauch and Heyen and Streit and G{\"o}tz and Debus},
  journal = {arXiv preprint arXiv:2602.18825},
  year = {2026}
}"""
SNIPPETS = {
    "onnx": """from predictor import Predictor  # the file beside this one; needs numpy and onnxruntime

network = Predictor(".")
images = network.read(["image.png"])  # or uint8 [n, {{ shape }}]
print(network.predict(images), network(images))""",
    "pt2": """import torch

network = torch.export.load("model.pt2").module()
images = torch.zeros(1, {{ shape }}, dtype=torch.uint8)
print(network(images))  # {{ outputs }}""",
    **dict.fromkeys(
        LAYOUTS,
        """from torch import load

state = load("model.pt", weights_only=True)
print({name: tuple(value.shape) for name, value in state.items()})""",
    ),
    "safetensors": """import numpy as np
from pyro_lottery.runs.predicting import open_folder

network = open_folder(".")
print(network(np.zeros((1, {{ shape }}), np.uint8)))""",
}
"""For each format, the lines of Python that predict; they run in the export's folder."""
METRICS = {
    "accuracy": ("accuracy", "accuracy"), "nll": ("nll", "negative log-likelihood"), "ece": ("ece", "expected calibration error"),
    "mace": ("mace", "mean absolute calibration error"), "brier": ("brier", "Brier score"),
}  # fmt: skip
TEXT = """
# {{ title | md }}

A sparse {{ kind }} `{{ facts.arch }}` found {{ method }}: {{ "{:,}".format(facts.remaining) }} of
{{ "{:,}".format(facts.total) }} prunable weights survive ({{ "%.2f" % (100 * facts.density) }} %, level {{ facts.level }}).
{{ what }}

| measured on | {{ dataset | md }}, {{ "{:,}".format(facts.compared_images) }} test images |
|---|---|
{% for name, value in measured %}
| {{ name }} | {{ "%.4f" % value }} |
{% endfor %}
{% for row in ood %}
| AUROC of {{ row.ood | md }} by {{ row.score | md }} | {{ "%.4f" % row.auroc }} |
{% endfor %}
| file | `{{ facts.file }}`, {{ "{:,}".format(facts.bytes) }} bytes |
{% if predict_ms is not none %}
| the run's own prediction | {{ "%.3g" % predict_ms }} ms for each image |
{% endif %}
| largest difference from {{ reference }} | {{ "%.1g" % largest }} |

## Use

```python
{{ snippet }}
```

{% if is_network %}
`{{ command }}image.png` does the same from the command line. The input `images` is uint8 [n, {{ shape }}] for any n, {{ colours }}.
Normalisation is part of the network: mean {{ mean }} and standard deviation {{ std }} of values from 0 to 1.
{{ "The shorter side of an image is resized to %d pixels and the centre is cut out." % facts.image_shape[2] if facts.resize else "" }}
Outputs: {{ outputs }}. Entropies are in nats{{ "; epistemic = total − aleatoric is what the weights' uncertainty adds" if "epistemic" in facts.outputs else "" }}.
{% else %}
The file holds weights alone; the network is `{{ facts.arch }}` of pyro_lottery, and returns logits. Its inputs are images
[n, {{ shape }}], {{ colours }}, as values from 0 to 1 minus the mean {{ mean }}, over the standard deviation {{ std }}.
{% endif %}

Classes: {{ facts.classes | map("md") | join(", ") }}.

## Training

{{ protocol }}

Licence: {{ licence }}. Written by pyro_lottery.

```bibtex
{{ citation }}
```
"""


def _escaped(text: object) -> str:
    """``text`` from a file, in one line of Markdown without markup."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", line)


BODY = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
BODY.filters["md"] = _escaped


def check_licence(licence: str) -> None:
    """Raise ``UserError`` unless ``licence`` is an identifier like those of the Hugging Face Hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(
            f"--licence {licence!r} is no identifier of a licence; expected one like apache-2.0 or cc-by-4.0"
        )


def card(level: Level, facts: Mapping[str, Any], licence: str, ood: Sequence[Mapping[str, Any]]) -> str:
    """The model card of an export with ``facts`` (those of ``export.json``), as Markdown with a YAML head.

    ``ood`` are rows of :func:`detections`, which like the time of a prediction are of the run's draws.
    """
    from huggingface_hub import EvalResult, ModelCardData

    config, row = level.run.config, level.run.row(level.number)
    dataset = config.data_name
    title = f"{config.arch}, {dataset}, {100 * row.density:.3g} % of the weights"
    measured = [(name, facts["measured"][key]) for key, (_, name) in METRICS.items() if key in facts["measured"]]
    head = ModelCardData(
        model_name=title, library_name="pyro_lottery", license=licence, pipeline_tag="image-classification",
        tags=["bayesian", "lottery-ticket", "pruning", "sparse", "uncertainty"],
        eval_results=[
            EvalResult(
                task_type="image-classification", dataset_type=config.dataset, dataset_name=dataset, dataset_split="test",
                metric_type=kind, metric_name=name, metric_value=float(facts["measured"][key]),
            )
            for key, (kind, name) in METRICS.items() if key in facts["measured"]
        ],
    )  # fmt: skip
    shape = ", ".join(map(str, facts["image_shape"]))
    outputs = ", ".join(f"`{name}` [n{', classes' if name == 'probs' else ''}]" for name in facts["outputs"])
    snippet = BODY.from_string(SNIPPETS[facts["format"]]).render(shape=shape, outputs=", ".join(facts["outputs"]))
    of_draws = facts["form"] == "draws"
    certain = level.posterior.scale is None and facts.get("samples", 1) == 1
    body = BODY.from_string(TEXT).render(
        title=title, facts=facts, dataset=dataset, measured=measured, ood=ood if of_draws else (),
        predict_ms=row.predict_ms if of_draws else None, method=_method(level.run), kind="deterministic" if certain else "Bayesian",
        is_network=facts["format"] not in LAYOUTS,
        largest=max(facts["largest_difference"].values()), snippet=snippet, shape=shape, outputs=outputs, what="This file holds its weights." if certain else _what(facts),
        colours="grey values" if facts["image_shape"][0] == 1 else "red, green, blue", licence=licence, citation=CITATION,
        mean=_numbers(facts["mean"]), std=_numbers(facts["std"]), protocol=_protocol(level),
        command="python -m pyro_lottery.predict . " + ("--trust-code " if _is_code(level, facts) else ""), reference=reference(facts["form"]),
    )  # fmt: skip
    return f"---\n{head.to_yaml()}\n---\n{body}"


def reference(form: str) -> str:
    """What an export is compared with: moments approximate the run, so that their file is compared with the formula."""
    return "the same pass in torch" if form == "moments" else "the run's network in fp32"


def _is_code(level: Level, facts: Mapping[str, Any]) -> bool:
    """Whether opening the file runs or imports code, which ``--trust-code`` allows."""
    return facts["format"] == "pt2" or (facts["format"] == "safetensors" and bool(named_code(level.run.config)))


def _what(facts: Mapping[str, Any]) -> str:
    kinds = {
        "mean": "This file holds one pass with the posterior's means.",
        "draws": f"This file holds {facts.get('samples')} posterior samples of the weights, drawn with seed {facts.get('seed')}.",
        "moments": "This file computes means and variances of all activations in one pass, without sampling.",
    }
    return kinds[facts["form"]]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


_METHODS = {
    "iterative": "iterative pruning", "gradual": "gradual pruning within one training", "dynamic": "dynamic sparse training",
}  # fmt: skip
"""What a schedule is called in a sentence."""


def _method(run: Run) -> str:
    """How the network's ticket was found, and what was done to it."""
    score, origin = f"the score `{run.config.score}`", run.folder.origin
    if origin == "transplant":
        of_run = run.folder.config[origin] == TICKETS_OF_RUN
        return (
            f"by transplanting a deterministic network's ticket, pruned by {score}"
            if of_run
            else "in a file of pruned weights, and transplanted"
        )
    method = f"by {_METHODS[run.config.schedule]} with {score}"
    if not origin:
        return method
    name = run.folder.config[origin]  # of a file that may hold anything
    return f"{method}, and randomised" + (f" by the control `{name}`" if name in CONTROLS else "")


def _protocol(level: Level) -> str:
    config = level.run.config
    epochs, rates = config.epochs_of(level.number), level.history["lr"]
    rate = f"learning rate {rates.max() if len(rates) else config.lr:g}"
    certain = config.guide == "deterministic"  # without a prior and a KL divergence
    prior = (
        ""
        if certain
        else f"prior `{config.prior}` of scale {config.prior_scale:g}, KL temperature {config.kl_temperature:g}, "
    )
    rewind = "" if config.rewind == "init" else f"rewinding `{config.rewind}`, "
    return (
        f"{epochs} epoch{'' if epochs == 1 else 's'} of this level, batch {config.batch_size}, {rate}, guide `{config.guide}`, {prior}score "
        f"`{config.score}`, {config.pruned}, {rewind}seed {config.seed}, {level.run.shape.num_data:,} training images."
    )


def detections(level: Level) -> list[dict[str, Any]]:
    """The level's rows (ood, score, auroc) of ``evaluation/ood.csv`` without those of another run, none if it was not evaluated.

    Raises ``Damaged`` for a file that ``pyro_lottery.evaluate`` does not write.
    """
    path: Path = level.run.folder.path / "evaluation" / "ood.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = [
                row for row in csv.DictReader(file) if int(row["level"]) == level.number and row["score"] != "baseline"
            ]
        return [{"ood": row["ood"], "score": row["score"], "auroc": float(row["auroc"])} for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise Damaged(f"{path} is damaged ({one_line(error)}); run python -m pyro_lottery.evaluate again") from error
