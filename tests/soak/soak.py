"""Question: is anything finished ever lost, and can a file that somebody sends do harm?

Runs of the quick preset on digits are killed, stopped, starved of disk and fed damaged files; every figure is counted, none
assumed. Linux, with a C compiler: faults come from a library that is preloaded (faults.c). The runs are children of one
process that has imported everything, so that a second of soak is a second of training.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyro_lottery as pl
from pyro_lottery import controls, evaluate, files, imp, report, sites, transplant, weights
from pyro_lottery.errors import Damaged
from pyro_lottery.runs import checkpoint
from pyro_lottery.runs.config import Config, from_json
from pyro_lottery.runs.folder import RunFolder

RUN = [
    "--arch",
    "lenet",
    "--preset",
    "quick",
    "--levels",
    "3",
    "--epochs",
    "6",
    "--milestones",
    "4",
    "--train-size",
    "300",
    "--eval-samples",
    "2",
]
KINDS = ("count", "no space", "I/O error", "short write", "lost write", "full disk", "kill")
"""In the order of faults.c. A short write says so and is to be repeated; of a lost one half is missing that was reported written."""
SAVE_SECONDS = 0.2
"""Between checkpoints here, so that kills and faults meet them; ordinarily 5."""
Figures = dict[str, Any]


def fingerprint(run: Path) -> tuple[dict[str, bytes], dict[str, list[list[str]]]]:
    """Everything that must be equal in equal runs: all safetensors, and all columns of the tables but times."""
    tensors = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}
    tables = {}
    for path in sorted(run.rglob("*.csv")):
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        keep = [i for i, name in enumerate(header) if name not in ("train_seconds", "step_ms", "seconds", "crc32")]
        tables[str(path.relative_to(run))] = [[row[i] for i in keep] for row in (header, *rows)]
    return tensors, tables


class Child:
    """A run in a forked process, with a fault armed."""

    def __init__(self, folder: Path, main: Callable[[list[str]], int], arguments: Sequence[str], at: int, kind: str):
        self.log = folder.with_name(f"{folder.name}.log")
        self.began, self.code = time.monotonic(), None
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_run(folder, main, list(arguments), at, kind)

    def _be_the_run(
        self, folder: Path, main: Callable[[list[str]], int], arguments: list[str], at: int, kind: str
    ) -> None:
        code = 1
        try:
            with open(self.log, "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115 (as Python's own)
            checkpoint.CHECKPOINT_SECONDS = SAVE_SECONDS
            _shim().soak_arm(os.fsencode(folder), at, KINDS.index(kind))
            try:
                code = main(arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            if kind == "count":
                counts = {name: _shim().soak_calls(number) for number, name in enumerate(KINDS)}
                folder.with_name(f"{folder.name}.calls").write_text(json.dumps(counts))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 60.0) -> int | None:
        """The exit code (negative: the signal that ended it), or None if it still works after ``seconds``."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > end:
                return None
            time.sleep(0.002)
        return self.code

    def complaints(self) -> list[str]:
        """What it said of errors and warnings; the lines of a traceback too."""
        lines = self.log.read_text(errors="replace").splitlines()
        if any(line.startswith("Traceback") for line in lines):
            return lines
        return [line for line in lines if line.startswith("python -m") and "warning:" not in line]


def _shim() -> Any:
    library = ctypes.CDLL(None)
    if not hasattr(library, "soak_arm"):
        raise SystemExit("tests.soak must be started by python -m tests.soak, which preloads faults.c")
    library.soak_calls.restype, library.soak_calls.argtypes = ctypes.c_long, [ctypes.c_int]
    library.soak_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    return library


def start(folder: Path, at: int = 0, kind: str = "count") -> Child:
    """The run in ``folder``, or what is left of it."""
    return Child(folder, imp.main, [*RUN, "--run-dir", str(folder)], at, kind)


def undisturbed(root: Path) -> tuple[Path, dict[str, int], float]:
    """The run to compare with, the number of calls that each kind of fault can hit, and its seconds."""
    folder = root / "whole"
    child = start(folder)
    assert child.wait(600) == 0, child.log.read_text()
    return folder, json.loads((root / "whole.calls").read_text()), time.monotonic() - child.began


def kills(root: Path, count: int) -> Figures:
    """SIGKILL ``count`` times: at random moments, and at random writing calls; every run is repeated to its end."""
    whole, calls, seconds = undisturbed(root)
    rng, expected = random.Random(0), fingerprint(whole)
    done = resumed = equal = runs = inside = 0
    while done < count:
        folder = root / f"killed{runs}"
        runs += 1
        killed = 0
        while True:
            at_call = rng.random() < 0.5 and done < count
            child = start(folder, rng.randint(1, calls["kill"] // 2), "kill") if at_call else start(folder)
            if not at_call and done < count and child.wait(rng.uniform(0, seconds / 2)) is None:
                os.kill(child.pid, signal.SIGKILL)
            code = child.wait(600)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"exit {code} after {killed} kills: {child.log.read_text()}"
            killed, done, inside = killed + 1, done + 1, inside + at_call
        resumed += killed
        equal += killed * (fingerprint(folder) == expected)
        shutil.rmtree(folder)
    return {
        "kills": done,
        "of them at a writing call": inside,
        "runs": runs,
        "resumed": resumed,
        "ended identical": equal,
    }


def stops(root: Path, count: int) -> Figures:
    """SIGTERM ``count`` times at random moments of training; exit 75, how soon, and the same results."""
    whole, _, seconds = undisturbed(root)
    rng, expected = random.Random(1), fingerprint(whole)
    done = right = equal = runs = 0
    longest = 0.0
    while done < count:
        folder, stopped = root / f"stopped{runs}", 0
        runs += 1
        while True:
            child = start(folder)
            while not (folder / ".owner").exists() and child.wait(0) is None:
                time.sleep(0.002)
            if done == count or child.wait(rng.uniform(0, seconds / 2)) is not None:
                code = child.wait(600)
                break
            os.kill(child.pid, signal.SIGTERM)
            asked = time.monotonic()
            code = child.wait(60)
            if code == 0:  # it was at its end
                break
            longest = max(longest, time.monotonic() - asked)
            done, stopped = done + 1, stopped + 1
            right += code == 75 and len(child.complaints()) == 1
        equal += stopped * (code == 0 and fingerprint(folder) == expected)
        shutil.rmtree(folder)
    return {"SIGTERMs": done, "exit 75": right, "longest, s": round(longest, 2), "ended identical": equal}


def faults(root: Path, every: int) -> Figures:
    """Each kind of fault at every ``every``-th writing call of a run: is it reported, is what counts as finished whole, and
    does the same command end the run as if nothing had been?
    """
    whole, calls, _ = undisturbed(root)
    expected, found = fingerprint(whole), Counter[str]()
    silent: list[str] = []
    for kind in KINDS[1:6]:
        for at in range(1, calls[kind] + 1, every):
            folder = root / "faulty"
            child = start(folder, at, kind)
            code, lines = child.wait(600), child.complaints()
            found["faults"] += 1
            if code == 0:
                found["without effect" if fingerprint(folder) == expected else "unreported"] += 1
            elif code in (1, 2) and len(lines) == 1:
                found["reported in one line, exit 1 or 2"] += 1
            else:
                silent.append(f"{kind} at {at}: exit {code}, {lines[-1:]}")
            found["corrupt finished levels"] += _corrupt(folder)
            again = start(folder)
            found["ended identical when repeated"] += again.wait(600) == 0 and fingerprint(folder) == expected
            shutil.rmtree(folder)
    for name in ("unreported", "corrupt finished levels"):
        found[name] += 0
    return {"writing calls": calls["kill"], **found, "otherwise": silent}


def _corrupt(folder: Path) -> int:
    """Levels with a row in ``results.csv`` whose files are not whole."""
    if not (folder / "config.json").exists():
        return 0
    run, corrupt = RunFolder(folder), 0
    config = from_json(run.config)
    for row in run.results():
        try:
            run.level(row.level).check(row, config.epochs_of(row.level))
        except Damaged:
            corrupt += 1
    return corrupt


# --- damaged and foreign files ---


def _readers(run: Path) -> dict[str, Callable[[], Any]]:
    """How each file of a run is read, as a value that can be compared."""
    folder = RunFolder(run)
    level = folder.level(0)

    def ticket() -> Any:
        found = pl.Ticket.load(level.path / "ticket.safetensors")
        return [found.mask, found.start.loc, found.start.scale, found.net, found.start.prunable]

    def posterior() -> Any:
        found, net = level.load_posterior()
        return [found.loc, found.scale, found.prunable, found.draws, net]

    def checkpoint() -> Any:
        return list(files.load_tensors(level.checkpoint))

    def network() -> Any:
        return pl.load_run(run).level(0).load_model().predict(torch.zeros(1, 1, 8, 8), 1)

    return {
        "level_00/ticket.safetensors": ticket,
        "level_00/posterior.safetensors": posterior,
        "level_00/checkpoint.safetensors": checkpoint,
        "config.json": lambda: [pl.load_run(run).config, network()],
        "results.csv": lambda: pl.load_run(run).results.to_dict(),
        "level_00/history.csv": lambda: pl.load_run(run).level(0).history.to_dict(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)


@st.composite
def mutations(draw: Any, contents: dict[str, bytes]) -> tuple[str, bytes, bool]:
    """A file's name, what it holds after some random changes, and whether its checksum was made to fit again."""
    name = draw(st.sampled_from(sorted(contents)))
    data = bytearray(contents[name])
    # Half of the changes hit the first kilobyte, where headers are.
    place = st.one_of(st.integers(0, min(1024, len(data))), st.integers(0, len(data)))
    for _ in range(draw(st.integers(1, 3))):
        at, size = min(draw(place), len(data)), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "delete", "insert", "repeat", "number", "zero"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "number":  # a digit of the text becomes a number
            digits = [i for i in range(at, min(at + 200, len(data))) if 48 <= data[i] < 58]
            if digits:
                new = draw(st.sampled_from([b"-1", b"0", b"99999999999", b"1e999", b"NaN", b'"x"', b"[[]]", b"null"]))
                data[digits[0] : digits[0] + 1] = new
        else:
            data[at : at + size] = bytes(len(data[at : at + size]))
    return name, bytes(data), draw(st.booleans())


def _reseal(name: str, data: bytes) -> bytes:
    """``data`` with the checksum that whoever forged it would give it; unchanged where its text cannot be read."""
    with suppress(Exception):
        if name.endswith(".json"):
            config = json.loads(data)
            config.pop("crc32", None)
            return json.dumps(config | {"crc32": f"{zlib.crc32(json.dumps(config).encode()):08x}"}).encode()
        if name.endswith(".csv"):
            header, *rows = data.decode().splitlines()
            header, rows = header.rpartition(",")[0], [row.rpartition(",")[0] for row in rows]
            sums = [f"{zlib.crc32(f'{header}{row}{len(rows)}'.encode()):08x}" for row in rows]
            return "\n".join([f"{header},crc32", *(f"{r},{s}" for r, s in zip(rows, sums, strict=True))]).encode()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        own = json.loads(header["__metadata__"]["pyro_lottery"])
        tensors = {}
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[key] = torch.frombuffer(bytearray(data[8 + size + begin : 8 + size + end]), dtype=torch.uint8)
        own["checksum"] = files.checksum(tensors, own["info"])
        header["__metadata__"]["pyro_lottery"] = json.dumps(own)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    return data


def damaged_files(root: Path, count: int) -> Figures:
    """Change files of a run at random, ``count`` times, half of them with a checksum that fits, and read them."""
    whole, *_ = undisturbed(root)
    run = root / "mutated"
    child = start(run)
    while not (run / "level_00" / "ticket.safetensors").exists():
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75, child.log.read_text()
    checkpoint = next(run.glob("level_*/checkpoint.safetensors")).read_bytes()
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    (run / "level_00" / "checkpoint.safetensors").write_bytes(checkpoint)

    readers = _readers(run)
    contents = {name: (run / name).read_bytes() for name in readers}
    right = {name: read() for name, read in readers.items()}
    found, wrong, slowest, most = Counter[str](), [], 0.0, 0.0

    def one(mutation: tuple[str, bytes, bool]) -> None:
        nonlocal slowest, most
        name, data, resealed = mutation
        data = _reseal(name, data) if resealed else data
        if data == contents[name]:
            return
        (run / name).write_bytes(data)
        found["files"] += 1
        before, began = _peak(), time.monotonic()
        try:
            value = readers[name]()
            if resealed or _same(value, right[name]):
                found["read, and right or valid"] += 1
            else:
                found["silently wrong"] += 1
                wrong.append(f"{name}: {data[:2000]!r}")
        except (pl.UserError, Damaged) as error:
            found["refused in one line" if "\n" not in str(error) else "refused in several lines"] += 1
        except Exception as error:  # what would be a traceback
            found["tracebacks"] += 1
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
        slowest, most = max(slowest, time.monotonic() - began), max(most, _peak() - before)
        (run / name).write_bytes(contents[name])

    quiet = settings(
        max_examples=count + count // 10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    quiet(given(mutations(contents))(one))()
    for name in ("silently wrong", "tracebacks", "refused in several lines"):
        found[name] += 0
    largest = max(map(len, contents.values())) / 2**20
    return {
        **found, "slowest, s": round(slowest, 2), "most memory that one took, MiB": round(most, 1),
        "largest file, MiB": round(largest, 2), "bombs refused": _bombs(root, whole), "what": wrong[:5],
    }  # fmt: skip


def _peak() -> float:
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _bombs(root: Path, whole: Path) -> str:
    """Pickles that run code, under the names of tickets, posteriors, checkpoints and state_dicts, in two formats."""
    fuse, refused = root / "exploded", 0
    shutil.copytree(whole, root / "bombs")
    level = RunFolder(root / "bombs").level(0)
    plain, zipped = root / "plain.pt", root / "zipped.pt"
    plain.write_bytes(pickle.dumps({"state_dict": _Bomb(fuse)}))
    torch.save({"state_dict": _Bomb(fuse)}, zipped)
    for bomb in (plain, zipped):
        renamed = bomb.with_suffix(".safetensors")
        for target in (renamed, *(level.path / f"{n}.safetensors" for n in ("ticket", "posterior", "checkpoint"))):
            shutil.copy(bomb, target)
        for read, more in (
            (level.load_ticket, ()), (level.load_posterior, ()), (files.load_tensors, (level.checkpoint,)),
            (weights.load, (bomb,)), (weights.load, (renamed,)),
        ):  # fmt: skip
            try:
                read(*more)
            except (Damaged, pl.UserError):
                refused += 1
    return f"{refused} of 10" + (", BUT CODE HAS RUN" if fuse.exists() else "")


# --- command lines ---

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


def together(root: Path) -> Figures:
    """Two processes started together: on one empty folder, and on one missing download."""
    folder = root / "shared"
    pair = [Child(root / name, imp.main, [*RUN, "--run-dir", str(folder)], 0, "count") for name in ("one", "two")]
    codes = sorted(str(child.wait(600)) for child in pair)
    told = [line for child in pair for line in child.complaints()]
    assert len(told) == 1, told
    return {
        "exit codes on one empty folder": codes,
        "the other is told of": told[0].partition(" another process ")[2].partition(" is at work")[0],
        **_downloads(root),
    }


def _downloads(root: Path) -> Figures:
    """Two processes that want one data set: a server of this process counts what they fetch."""
    archive, sums = _tiny_cifar(root), dict[str, str]()
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            sums[Path(member.name).name] = hashlib.md5(content.read()).hexdigest()
    fetched: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Method") != "HEAD":  # with which torchvision asks for redirections first
                fetched.append(self.path)
            time.sleep(0.5)  # both shall want it while it is on its way
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    def load(_: list[str]) -> int:
        cifar = torchvision.datasets.CIFAR10
        cifar.url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        cifar.filename, cifar.tgz_md5 = archive.name, hashlib.md5(archive.read_bytes()).hexdigest()
        cifar.train_list, cifar.test_list = ([[n, sums[n]]] for n in ("data_batch_1", "test_batch"))
        cifar.meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
        os.environ["no_proxy"] = "*"
        return 0 if len(pl.data.load("cifar10", root / "data").train) == 10 else 1

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pair = [Child(root / name, load, [], 0, "count") for name in ("first", "second")]
        codes = [child.wait(60) for child in pair]
        server.shutdown()
    return {"exit codes on one missing download": codes, "downloads": len(fetched)}


def _tiny_cifar(root: Path) -> Path:
    rows = np.zeros((10, 3072), dtype=np.uint8)
    batch = {"data": rows, "labels": list(range(10))}
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in (
            ("data_batch_1", batch),
            ("test_batch", batch),
            ("batches.meta", {"label_names": ["a"] * 10}),
        ):
            data = pickle.dumps(value)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def ranks(root: Path, count: int) -> Figures:
    """Bad input on two ranks, ``count`` times beside two busy loops: each command must say it in one line and exit with 2."""
    bad = ["--devices", "2", "--device", "cpu", "--batch-size", "3", "--run-dir", str(root / "run")]
    command = [sys.executable, "-m", "pyro_lottery.imp", *RUN, *bad]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    found, otherwise = Counter[str](), []
    try:
        for _ in range(count):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            found[f"exit {done.returncode}"] += 1
            if done.returncode != 2 or done.stderr.count("\n") != 1:
                otherwise.append(f"exit {done.returncode}: {done.stderr[-500:]}")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {**found, "otherwise": len(otherwise), "what": otherwise[:5]}


PARTS = ("kills", "stops", "faults", "damaged_files", "random_commands", "together", "ranks")


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        try:
            yield Path(folder)
        finally:
            os.chdir(here)


def soak(given: argparse.Namespace) -> Figures:
    """Every part, printed as it ends."""
    amounts = {
        "kills": (given.kills,), "stops": (given.stops,), "faults": (given.every,), "damaged_files": (given.mutations,),
        "random_commands": (given.commands,), "together": (), "ranks": (given.ranks,),
    }  # fmt: skip
    figures: Figures = {}
    for name in PARTS:
        began = time.monotonic()
        with _scratch(name) as root:
            figures[name] = globals()[name](root, *amounts[name])
        figures[name]["seconds"] = round(time.monotonic() - began)
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in figures[name].items())}", flush=True)
    return figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default: 50)")
    parser.add_argument("--stops", type=int, default=20, help="SIGTERMs (default: 20)")
    parser.add_argument("--every", type=int, default=1, help="faults at every so many writing calls (default: 1)")
    parser.add_argument("--mutations", type=int, default=2000, help="changed files (default: 2000)")
    parser.add_argument("--commands", type=int, default=500, help="random command lines (default: 500)")
    parser.add_argument("--ranks", type=int, default=50, help="bad input on two ranks (default: 50)")
    parser.add_argument("-o", "--output", type=Path, help="file for the figures as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Start again with faults.c preloaded, soak, print and write."""
    given = parser().parse_args(arguments)
    if sys.platform != "linux":
        print("python -m tests.soak: needs Linux, whose file system calls it lets fail", file=sys.stderr)
        return 2
    if not hasattr(ctypes.CDLL(None), "soak_arm"):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            library = Path(folder, "faults.so")
            source = Path(__file__).with_name("faults.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
            again = [sys.executable, "-m", "tests.soak", *(sys.argv[1:] if arguments is None else arguments)]
            preload = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}  # a forked OpenMP has no threads
            return subprocess.run(again, env=os.environ | preload).returncode
    figures = soak(given)
    if given.output:
        files.write_json(given.output, figures)
    return 0
