"""Random command lines."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyro_lottery import controls, evaluate, imp, report, sites, transplant
from pyro_lottery.runs.config import Config
from tests.soak.child import Child, Figures, undisturbed

ODD = [
    "", " ", "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "99999999999999999999", "1e999", "None", "true", "ünï", "💥",
    "../..", "/dev/null", "/", "a\nb", "\t", "'; echo", "$(id)", "%s%n", "--", "x" * 5000, "lenet", "digits", "snr", "init",
    "epoch:1", "epoch:0", "os.system", "pyro.infer.autoguide.AutoNormal", "timm:", "timm:no", "normal", "laplace", "cuda:99",
    "auto", "deterministic", "mean_field", "crop", "local", "bf16", "retry", "[]", "{}", "*", "\udcff",
]  # fmt: skip
SMALL = {
    "arch": "lenet", "dataset": "digits", "train_size": "20", "test_size": "10", "epochs": "1", "levels": "0",
    "milestones": "1", "batch_size": "10", "eval_samples": "1", "precision": "32",
}  # fmt: skip
RIGHT: dict[str, list[str]] = {
    "arch": ["lenet", "resnet20"], "augment": ["none", "crop", "crop_flip"], "guide": ["mean_field", "deterministic"],
    "prior": ["normal", "laplace", "student_t", "mixture", "fan_in"], "prior_scale": ["0.3", "2"], "seed": ["0", "123"],
    "score": ["snr", "magnitude", "squared_sum", "random"], "levels": ["0", "1"], "prune_fraction": ["0.1", "0.99"],
    "rewind": ["init", "lr", "epoch:1", "restart:1"], "epochs": ["1", "2"], "batch_size": ["7", "64"], "lr": ["0.1", "1e-5"],
    "warmup_epochs": ["1"], "kl_warmup_epochs": ["1"], "weight_decay": ["0", "0.1"], "kl_temperature": ["1"], "kl": ["monte_carlo"],
    "init_scale": ["0.5"], "estimator": ["local"], "train_samples": ["2"], "device": ["cpu"], "on_divergence": ["retry"],
    "val_fraction": ["0.2"], "image_size": ["8", "12"],
}  # fmt: skip


@st.composite
def command_lines(draw: Any, run: Path) -> tuple[str, list[str]]:
    """A command and arguments: some right, some wrong in type, range or combination."""
    name = draw(st.sampled_from(["imp", "imp", "imp", "sites", "evaluate", "controls", "transplant", "report"]))
    values = st.sampled_from(ODD)
    source = draw(st.sampled_from([str(run), str(run), str(run / "results.csv"), "/", "", "no", "ü\n"]))
    if name in ("imp", "sites", "transplant"):
        known = sorted(Config.__dataclass_fields__)
        options = dict(SMALL) if name != "transplant" else dict(SMALL, levels="1")
        for _ in range(draw(st.integers(0, 4))):
            option = draw(st.sampled_from(known))
            options[option] = draw(
                st.sampled_from(RIGHT[option]) if option in RIGHT and draw(st.booleans()) else values
            )
        if draw(st.booleans()):
            options["preset"] = draw(st.sampled_from(["quick", "smoke", "paper", "no", ""]))
    else:
        known = {
            "evaluate": ["levels", "samples", "ood", "device", "data_dir", "corruptions", "trust_code"],
            "controls": ["control", "levels", "device", "data_dir"],
            "report": ["output", "title", "x"],
        }[name]
        options = {draw(st.sampled_from(known)): draw(values) for _ in range(draw(st.integers(0, 3)))}
        if name == "controls" and draw(st.booleans()):
            options["control"] = draw(st.sampled_from(["reinit", "shuffle_global", "no"]))
    arguments = [] if name in ("imp", "sites") else [source]
    lacking = draw(st.sampled_from([*3 * [""], *options]))  # at most one option has no value
    for option, value in options.items():
        arguments += [f"--{option.replace('_', '-')}"] + ([] if option == lacking else [value])
    return name, arguments


def random_commands(root: Path, count: int) -> Figures:
    """Start ``count`` random command lines; each must exit with 0 or 2."""
    whole, *_ = undisturbed(root)
    modules = {"imp": imp, "sites": sites, "evaluate": evaluate, "controls": controls}
    modules |= {"transplant": transplant, "report": report}
    found, otherwise = Counter[str](), []
    home = root / "commands"
    home.mkdir()
    os.chdir(home)

    def one(line: tuple[str, list[str]]) -> None:
        name, arguments = line
        child = Child(root / "command", modules[name].main, arguments, 0, "count")
        code = child.wait(60)
        if code is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        found[f"exit {code}"] += 1
        found["commands"] += 1
        log = child.log.read_text(errors="replace")
        if code not in (0, 2) or "Traceback" in log:
            otherwise.append(f"exit {code} {log.splitlines()[-1:]} of {name} {arguments}"[:600])

    quiet = settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        quiet(given(command_lines(whole))(one))()
    finally:
        os.chdir(root)
    return {**found, "otherwise": len(otherwise), "what": otherwise[:5]}
