import os

from pyro_lottery import faster


def test_the_faster_way_is_taken_and_every_later_process_takes_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(faster, "_known", {})

    def ready():
        return lambda: None

    def slow():
        return lambda: sum(range(200_000))

    assert faster.is_faster(ready, slow, "some work")
    monkeypatch.setattr(faster, "_known", {})
    assert faster.is_faster(slow, ready, "some work"), "the first measurement counts"
    assert not faster.is_faster(slow, ready, "other work")
    (path, other) = sorted((tmp_path / "pyro_lottery" / "fastest").iterdir())
    for damaged in (path, other):
        damaged.write_text("{")
    monkeypatch.setattr(faster, "_known", {})
    assert faster.is_faster(slow, ready, "some work") is False


def test_a_measurement_is_kept_without_hard_links(tmp_path, monkeypatch):
    def none(*paths):
        raise PermissionError("no hard links here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "link", none)
    for seconds, expected in (((1, 2), "first"), ((2, 1), "first")):  # that of the first process counts
        monkeypatch.setattr(faster, "_known", {})
        monkeypatch.setattr(faster, "_measure", lambda ways, seconds=seconds: dict(zip(ways, seconds, strict=True)))
        assert faster.fastest({"first": None, "second": None}, "some work") == expected
