"""What two ranks find out about themselves, for test_distributed.py: ``python -m tests.two_ranks FILE``."""

import atexit
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam

import pyro_lottery as pl
from pyro_lottery import distributed as ranks
from pyro_lottery import seeds, training
from pyro_lottery.elbo import ELBO
from pyro_lottery.errors import Failed
from pyro_lottery.training import TrainState

IMAGES = 7
"""Of the joined batch: four on the first rank, three on the second."""
DRAWS = 400


def network(deterministic):
    """A network without BatchNorm, whose statistics are of each rank's own images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    model = pl.BayesianClassifier(net, num_data=60, kl_temperature=0.1)
    return model, pl.guides.deterministic(model) if deterministic else pl.guides.mean_field(model, 1.0)


def step(model, guide, x, y, who):
    """The gradient after a step, and the sums (nll, kl, correct, images) of it."""
    optimizer = Adam(guide.parameters(), 0.0)
    sums = training.step(model, guide, ELBO("analytic"), optimizer, x, y, ranks=who)
    return torch.cat([p.grad.flatten() for p in guide.parameters()]), who.total(sums)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def note_threads(path):
    """What is left when the interpreter is about to end: called after the handlers that ``ranks.start`` registers."""
    names = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    Path(path).with_suffix(".threads").write_text("\n".join(names))


def main(path):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        atexit.register(note_threads, path)
    several = ranks.start("cpu", 2, 1, "ddp", "data")
    single = steps(ranks.ALONE, 2 * DRAWS, 6, several.path)
    found = {each.parallel: find_out(each, single) for each in (several, ranks.Several(several.fabric, "samples"))}
    if several.rank == 0:
        with open(path, "w") as file:
            json.dump(found, file, default=lambda value: value.tolist())


def joined():
    """The joined batch."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 1, 4, 4, generator=generator), torch.randint(0, 3, (IMAGES,), generator=generator)


def steps(who, count, seed, path):
    """Steps of ``who``, each with weight noise of its own."""
    (model, guide), batch = network(False), joined()
    with seeds.rng("cpu", seed, "noise", *path):
        return [step(model, guide, *batch, who) for _ in range(count)]


def augmented(who):
    """The batches of an epoch of random crops and flips, [steps, b, 1, 8, 8] and [steps, b], and those from step 1 on of a
    training that was stopped there and resumed.
    """
    pixels = torch.randint(0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    data = pl.data.from_tensors(pixels, torch.arange(24), pixels, torch.arange(24), augment="crop_flip")
    model, guide = network(False)
    whole, broken, again = TrainState(), TrainState(), TrainState()

    def read(state, steps):
        adam, found = Adam(guide.parameters()), []
        with state.using(adam, who), training.epoch(model, data, state, batch_size=8, ranks=who) as batches:
            for _ in range(steps):
                found.append(batches.batch(state.step))
                state.step += 1
            saved = state.state_dict() if state.step < len(batches) else {}
        return tuple(torch.stack(several) for several in zip(*found, strict=True)), saved

    (x, y), _ = read(whole, 3)
    _, saved = read(broken, 1)
    # The first rank alone reads and writes checkpoints.
    with again.using(Adam(guide.parameters()), who):
        again.load_state_dict(who.first(lambda: saved))
    return x, y, read(again, 2)[0][0]


def find_out(several, single):
    """Compare ``several`` ranks with one that has the joined batch, of which ``single`` are steps."""
    x, y = joined()
    found = {"world": several.world, "images": several.gather(torch.tensor(len(several.share(y))))}

    together, alone = step(*network(True), x, y, several), step(*network(True), x, y, ranks.ALONE)
    found["gradient"] = difference(together[0], alone[0])
    nll_and_correct = [sums[[0, 2]] / sums[3] for _, sums in (together, alone)]
    found["sums"] = difference(*nll_and_correct)

    with seeds.rng("cpu", 5, "noise", *several.path):
        noise = torch.rand(3)
    draws = steps(several, DRAWS, 5, several.path)
    found["noise"] = [n.tolist() for n in several.gather(noise)]
    # Minus the ELBO per image, without what does not differ: nll of all images. Two ranks of data are one draw each.
    a, b = (torch.stack([s[0] / s[3] for _, s in found]) for found in (draws, single))
    b = several.total(b) / several.world  # the mean over both ranks' draws
    found["elbo"] = [float(a.mean() - b.mean()), float((a.var() / len(a) + b.var() / len(b)).sqrt())]
    found["kl"] = difference(draws[0][1][1], single[0][1][1])
    found["spread"] = float(
        torch.stack([g for g, _ in draws]).var(0).mean() / torch.stack([g for g, _ in single]).var(0).mean()
    )

    x, y, rest = augmented(several)
    alone = augmented(ranks.ALONE)
    found["same images"] = [torch.equal(each, alone[1]) for each in several.gather(y)]
    found["same augmentation"] = [torch.equal(each, alone[0]) for each in several.gather(x)]
    found["differently augmented"] = [
        float((each != alone[0]).flatten(2).any(2).float().mean()) for each in several.gather(x)
    ]
    found["resumed"] = [torch.equal(a, b[1:]) for a, b in zip(several.gather(rest), several.gather(x), strict=True)]

    def fail():
        raise pl.UserError("only the first knows")

    for name, act in (
        ("first", lambda: several.first(fail)),
        ("agree", lambda: several.agree("it", lambda: several.rank)),
    ):
        try:
            act()
        except (pl.UserError, Failed) as error:
            found[name] = several.gather(torch.tensor(len(str(error)))), str(error)

    def fail_second():
        if several.rank == 1:
            raise pl.UserError("only the second knows")

    try:
        several.every(fail_second)
    except pl.UserError as error:
        found["every"] = several.gather(torch.tensor(len(str(error)))), str(error)
    found["any"] = several.any(several.rank == 1), several.any(False)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
