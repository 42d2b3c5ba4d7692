import html
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import report
from pyro_lottery.controls import run_control
from pyro_lottery.runs.cli import parse
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.transplant import transplant_run
from tests.support import small_run

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Bayesian run, and a deterministic one whose files and folder say what they should not be able to do."""
    root = tmp_path_factory.mktemp("runs")
    names = {"mean_field": "bayesian", "deterministic": "<img src=x onerror=alert(2)> $x$"}
    for guide, name in names.items():
        small_run(root / name, guide=guide)
    folder = RunFolder(root / names["deterministic"])
    config = folder.config
    config["hardware"]["name"] = HOSTILE
    folder.save_config(config | {HOSTILE: {"x": HOSTILE}})
    return [str(root / name) for name in names.values()]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([*runs, "-o", str(path), "--title", HOSTILE]) == 0
    return path


def test_everything_from_a_file_stays_text(page):
    text = page.read_text()
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;img src=x onerror=alert(2)&gt;" in text


def test_it_needs_no_network(page):
    class Addresses(HTMLParser):
        found = re.findall(r"url\(([^)]+)\)", page.read_text())

        def handle_starttag(self, tag, attributes):
            self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    parser = Addresses()
    parser.feed(page.read_text())
    assert parser.found
    assert [address for address in parser.found if not address.startswith("#")] == []


def test_the_numbers_are_those_of_the_runs(runs, page):
    text = page.read_text()
    for path in runs:
        for row in pl.load_run(path).folder.results():
            assert f'<td data-value="{row.nll}">{row.nll:.4f}</td>' in text
            assert f'<td data-value="{row.remaining}">{row.remaining:,}</td>' in text
    first = pl.load_run(runs[0]).folder.results()[1]
    assert f">{first.remaining * 8 / 1024:,.1f}<" in text, "loc and scale of every surviving weight"


def test_the_command_trains_the_same_run(runs):
    for path in runs:
        config = pl.load_run(path).config
        words = shlex.split(report.command(pl.load_run(path)))
        assert words[:3] == ["python", "-m", "pyro_lottery.imp"]
        assert parse("x", "", words[3:]) == config


def test_the_command_of_a_run_that_was_moved_trains_it_where_it_is(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "moved")
    words = shlex.split(report.command(pl.load_run(tmp_path / "moved")))
    assert words[words.index("--run-dir") + 1] == str(tmp_path / "moved")


def test_the_command_of_a_control_and_of_a_transplant(runs):
    control = run_control(pl.load_run(runs[0]), "reinit", [1])
    assert shlex.split(report.command(control)) == [
        "python", "-m", "pyro_lottery.controls", runs[0], "--control", "reinit", "--levels", "1",
    ]  # fmt: skip
    moved = transplant_run(pl.load_run(runs[1]), [1], epochs=3, train_samples=2, milestones=(2,))
    assert moved.config.history_samples == 2  # it follows from the transplant's own samples
    assert shlex.split(report.command(moved)) == [
        "python", "-m", "pyro_lottery.transplant", runs[1], "--levels", "1",
        "--epochs", "3", "--milestones", "2", "--train-samples", "2",
    ]  # fmt: skip
    name = f"{pl.load_run(runs[0]).folder.path.name}/controls/reinit"
    assert html.escape(name) in report.report([control])


def test_bad_input_is_one_line(runs, tmp_path, refused):
    for arguments, message in [
        ([str(tmp_path)], "is not a run folder"),
        ([runs[0], "-o", str(tmp_path / "no" / "r.html")], "does not exist; create it"),
        ([runs[0], "-o", str(tmp_path)], "is a folder; name a file"),
    ]:
        refused(report.main, arguments, message)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for switch in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ):  # fmt: skip
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def column(browser, place):
    script = "return [...document.querySelector('tbody').rows].map(r => Number(r.cells[arguments[0]].dataset.value))"
    return browser.execute_script(script, place)


def test_in_a_browser_it_sorts_without_complaint(browser, page):
    browser.get(page.as_uri())
    assert browser.title == HOSTILE
    buttons = browser.find_elements("css selector", "table:first-of-type th button")[: len(report.COLUMNS)]
    nll = [name for name, _, _ in report.COLUMNS].index("NLL")
    before = column(browser, nll)
    assert len(before) == 3
    buttons[nll].click()
    assert column(browser, nll) == sorted(before)
    buttons[nll].click()
    assert column(browser, nll) == sorted(before, reverse=True)
    head = browser.find_elements("css selector", "th")[nll]
    assert head.get_attribute("aria-sort") == "descending"
    buttons[0].click()
    assert column(browser, nll) == before
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows(browser, page, width):
    # A window of a headless Chromium is at least 500 pixels wide; the device's width is emulated.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    root = "document.documentElement"
    inner, scroll, client = browser.execute_script(f"return [innerWidth, {root}.scrollWidth, {root}.clientWidth]")
    assert (inner, scroll) == (width, client)
    outside = f"""
      return [...document.querySelectorAll("h1,h2,p,pre,figure,svg,dl,.wide")]
        .filter(e => e.getBoundingClientRect().right > {root}.clientWidth + 0.5).map(e => e.tagName)"""
    assert browser.execute_script(outside) == []


def test_regressions_and_classifiers_are_compared_apart(runs, tmp_path, tiny_data):
    x, y = tiny_data.train[:].flatten(1), tiny_data.train.targets
    own = pl.data.from_tensors(x, y.float()[:, None], x, y.float()[:, None])
    real = pl.find_tickets(torch.nn.Linear(16, 1), own, levels=0, epochs=1, milestones=(), run_dir=tmp_path / "real")
    classes = pl.load_run(runs[0])
    each = [report.report(some).count("<svg") for some in ([real], [classes])]
    assert report.report([real, classes]).count("<svg") == sum(each)  # no figure has both
    assert report.report([real, classes, classes]).count("<svg") == sum(each) + each[1] + 1


def test_a_page_of_one_run(runs):
    text = report.report([pl.load_run(runs[0])])
    assert "1 run," in text
    assert text.count("<svg") == 4
