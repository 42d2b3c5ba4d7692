from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import pyro_lottery as pl
from experiments import odd_folders
from experiments.odd_folders import CASES
from experiments.trials.folders import plain, save
from pyro_lottery import data
from pyro_lottery.data.images import crop, resize

TABLE = Path(__file__).parents[2] / "plots" / "gallery" / "folders.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_comes_of_odd_folders(case):
    assert odd_folders.try_out(case) == case.expected


def test_the_gallery_shows_these_cases():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert TABLE.read_text("utf-8") == odd_folders.markdown(CASES)


def test_the_table_is_written_where_a_case_fails_too(tmp_path, monkeypatch, capsys):
    wrong = odd_folders.Case("plain", plain, odd_folders.Outcome("cat 1"))
    monkeypatch.setattr(odd_folders, "CASES", [CASES[0], wrong])
    assert odd_folders.main(["-o", str(tmp_path / "t.md")]) == 1
    assert capsys.readouterr().out.startswith("plain: ")
    assert "| plain | cat 1; test:  |" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize(("width", "height"), [(9, 9), (40, 27), (31, 64), (7, 50), (13, 5)])
@pytest.mark.parametrize("size", [8, 13, 32])
def test_resizing_is_torchvisions_resize_and_centre_crop(width, height, size):
    rng = np.random.default_rng(0)
    for shape in ((height, width), (height, width, 3)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        expected = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])(image)
        assert np.array_equal(np.array(crop(image, size)), np.array(expected))


def test_a_very_wide_image_takes_no_more_memory_than_it_has():
    image = Image.new("L", (2**24, 1), 7)
    assert (np.array(crop(image, 64)) == 7).all()


def test_image_size_resizes_the_images_of_any_data_set():
    small, large = data.load("digits"), data.load("digits", image_size=12)
    assert large.train.pixels.shape == (1437, 1, 12, 12)
    assert large.image_size == (12, 12)
    image = Image.fromarray(small.test.pixels[3, 0].numpy())
    assert np.array_equal(large.test.pixels[3, 0].numpy(), np.array(v2.Resize(12)(image)))
    assert torch.equal(large.train.labels, small.train.labels)
    assert torch.equal(data.load("digits", image_size=8).train.pixels, small.train.pixels)


def test_colours_are_resized_channel_by_channel():
    pixels = torch.randint(0, 256, (2, 3, 9, 6), dtype=torch.uint8)
    expected = crop(Image.fromarray(pixels[1].permute(1, 2, 0).numpy()), 4)
    assert np.array_equal(resize(pixels, 4)[1].permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.parametrize("size", [0, -1, 2049, 2.5])
def test_sizes_that_no_image_can_have_are_named(size):
    with pytest.raises(pl.UserError, match=f"image_size must be a whole number from 1 to 2048, got {size}"):
        data.load("digits", image_size=size)


def test_images_that_a_size_makes_too_large_for_memory_are_refused(monkeypatch):
    monkeypatch.setattr("pyro_lottery.data.images.memory", lambda: 2**30)
    with pytest.raises(
        pl.UserError, match=r"1,797 images of 1×1000×1000 need 1\.7 GiB of memory, but there are 1\.0 GiB"
    ):
        data.load("digits", image_size=1000)


def test_what_is_said_is_said_again_of_images_that_lie_decoded(tmp_path):
    save(plain(tmp_path) / "train/cat/10.png", (1, 1, 1, 0), "RGBA")
    save(tmp_path / "train/cat/1.png", 1).rename(tmp_path / "train/cat/1.heic")
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="1 file with .heic in train/ is not read"),
            pytest.warns(match="transparency"),
        ):
            found = data.load("folder", tmp_path)
    assert found.train.pixels[:, 0, 0, 0].tolist() == [1, 20, 30, 40]


def test_class_names_are_known(tmp_path):
    assert data.load("folder", plain(tmp_path)).classes == ("cat", "dog")
    assert data.load("digits").classes == tuple("0123456789")


def test_what_is_not_to_be_written_is_not(tmp_path):
    before = sorted(plain(tmp_path).rglob("*"))
    assert len(data.load("folder", tmp_path, write=False).train) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_decoded_images_are_not_kept_where_writing_them_needs_more_memory_than_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_lottery.data.folders.memory", lambda: 12)
    with pytest.warns(UserWarning, match="too little memory to cache the images"):
        assert len(data.load("folder", plain(tmp_path)).train) == 4
    assert not (tmp_path / "pyro_lottery.safetensors").exists()


def test_other_images_are_made_as_large_as_the_runs(tmp_path, monkeypatch):
    others = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr("pyro_lottery.data.sources._split", lambda *a: ((others, torch.zeros(5)), ()))
    test = data.load("folder", plain(tmp_path), image_size=8).test
    test = data.Split(test.pixels.expand(2, 3, 8, 8), test.labels, test.mean, test.std)
    found = data.out_of_distribution(test, "cifar100", tmp_path, image_size=8)
    assert torch.equal(found.pixels, resize(others[:2], 8))
    assert data.corrupt(test, "pixelate", 3).pixels.shape == (2, 3, 8, 8)
    with pytest.raises(pl.UserError, match=r"images of shape \(3, 32, 32\), but those of the run have \(3, 8, 8\)"):
        data.out_of_distribution(test, "cifar100", tmp_path)
