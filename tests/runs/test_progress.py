import io

from rich.console import Console

from pyro_lottery.runs.progress import LevelDisplay, results_table
from pyro_lottery.types import LevelResult


def test_plain_lines_are_rare_without_a_terminal(capsys):
    with LevelDisplay(1, 2, 0.8, 5, Console(file=io.StringIO())) as display:
        for _ in range(100):
            display.update(1.0, "nll 1.0")
        display.update(5, "done", always=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "level 1/2, density 80 %: epoch 1/5, nll 1.0",
        "level 1/2, density 80 %: epoch 5/5, done, 0 s left",
    ]


def test_a_schedule_says_to_which_density(capsys):
    for begin, end in ((1.0, 0.02), (0.1, 0.1), (0.1, None)):
        with LevelDisplay(0, 1, begin, 5, Console(file=io.StringIO()), end=end) as display:
            display.update(5, "done", always=True)
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["level 0/1, density 100 to 2 %", "level 0/1, density 10 %", "level 0/1, density 10 %"]


def test_a_terminal_gets_a_bar_with_loss_accuracy_density_and_time_left():
    screen = io.StringIO()
    with LevelDisplay(1, 2, 0.8, 5, Console(file=screen, force_terminal=True, width=120)) as display:
        display.update(2.5, "nll 1.0, accuracy 90 %")
    for part in ("level 1/2, density 80 %", "50 %", "left", "nll 1.0, accuracy 90 %"):
        assert part in screen.getvalue()


def test_the_table_shows_every_level_whole():
    screen = io.StringIO()
    row = LevelResult(
        level=0, density=1.0, remaining=11_158_080, total=11_158_080, test_accuracy=0.9917, max_test_accuracy=0.9944,
        nll=0.0338, mace=0.277, ece=0.0123, brier=0.3, train_seconds=151.1, step_ms=538.8,
    )  # fmt: skip
    Console(file=screen, width=80).print(results_table([row]))
    for cell in ("100.00", "11,158,080", "99.17", "99.44", "0.0338", "0.2770", "151", "539"):
        assert cell in screen.getvalue()
