import csv

import pytest

from tests.fingerprint import RUNS, checksum_of, main, needed


@pytest.fixture
def run(tmp_path):
    (tmp_path / "level_00").mkdir()
    (tmp_path / "level_00" / "ticket.safetensors").write_bytes(b"bits")
    write(tmp_path / "level_00" / "history.csv", loss=1.5, seconds=2.0)
    write(tmp_path / "results.csv", nll=0.5, train_seconds=2.0, step_ms=3.0)
    return tmp_path


def write(path, **row):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


def test_times_do_not_count(run):
    before = checksum_of(run)
    write(run / "level_00" / "history.csv", loss=1.5, seconds=7.0)
    write(run / "results.csv", nll=0.5, train_seconds=9.0, step_ms=1.0)
    assert checksum_of(run) == before


def test_a_byte_of_a_ticket_and_a_digit_of_a_loss_count(run):
    found = {checksum_of(run)}
    (run / "level_00" / "ticket.safetensors").write_bytes(b"bitt")
    found.add(checksum_of(run))
    write(run / "level_00" / "history.csv", loss=1.6, seconds=2.0)
    found.add(checksum_of(run))
    assert len(found) == 3


def test_sources_of_controls_and_transplants_come_first():
    assert needed(["transplant", "control"]) == ["mean_field", "deterministic", "control", "transplant"]
    assert needed(list(RUNS)) == list(RUNS)


@pytest.mark.slow
def test_a_difference_is_named(tmp_path, capsys):
    (tmp_path / "before.json").write_text('{"deterministic": "00000000"}')
    assert main(["--only", "deterministic", "--compare", str(tmp_path / "before.json")]) == 1
    assert "DIFFERS, was 00000000" in capsys.readouterr().out
