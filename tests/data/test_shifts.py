import numpy as np
import pytest
import torch
from PIL import Image

import pyro_lottery as pl
from pyro_lottery import data
from pyro_lottery.data import Split
from tests.support import cifar10_c


@pytest.fixture
def split():
    coarse = torch.randint(40, 200, (12, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    pixels = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").to(
        torch.uint8
    )  # as smooth as images
    return Split(pixels, torch.arange(12) % 3, torch.full((3,), 0.5), torch.full((3,), 0.25))


@pytest.mark.parametrize("kind", data.CORRUPTIONS)
def test_corruptions_grow_and_are_always_alike(split, kind):
    change = []
    for severity in data.SEVERITIES:
        found = data.corrupt(split, kind, severity)
        assert found.pixels.dtype == torch.uint8
        assert found.pixels.shape == split.pixels.shape
        assert torch.equal(found.labels, split.labels)
        assert torch.equal(found.pixels, data.corrupt(split, kind, severity).pixels)
        change.append(float((found.pixels.float() - split.pixels.float()).square().mean()))
    assert change[0] < change[2] < change[4] == max(change)
    assert change[0] > 0


def test_images_of_three_pixels_are_corrupted_too():
    tiny = Split(torch.full((2, 1, 3, 3), 100, dtype=torch.uint8), torch.zeros(2), torch.zeros(1), torch.ones(1))
    for kind in data.CORRUPTIONS:
        assert data.corrupt(tiny, kind, 5).pixels.shape == (2, 1, 3, 3)


@pytest.mark.parametrize("severity", data.SEVERITIES)
def test_pixelate_is_the_box_filter_of_cifar10_c(severity):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = data.corrupt(Split(pixels, torch.zeros(3), torch.zeros(3), torch.ones(3)), "pixelate", severity).pixels
    small = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    for image, ours in zip(pixels, found, strict=True):
        original = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = original.resize((small, small), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        assert np.array_equal(np.array(theirs), ours.permute(1, 2, 0).numpy())


def test_corruptions_by_hand(split):
    grey = Split(torch.full((1, 1, 8, 8), 100, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert data.corrupt(grey, "brightness", 1).pixels.unique().tolist() == [113]  # 100 + 255·0.05
    assert data.corrupt(grey, "brightness", 5).pixels.unique().tolist() == [176]
    for kind in ("blur", "contrast", "pixelate"):
        assert data.corrupt(grey, kind, 5).pixels.unique().tolist() == [100], f"{kind} leaves an even image alone"
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)
    image = torch.stack([red, torch.tensor([0, 0, 0], dtype=torch.uint8)], 1).view(1, 3, 1, 2)
    image = Split(image, torch.zeros(1), torch.zeros(3), torch.ones(3))
    # V of HSV grows from 200/255 to 1, and hue and saturation stay; black becomes grey.
    assert data.corrupt(image, "brightness", 5).pixels[0, :, 0].tolist() == [[255, 76], [51, 76], [51, 76]]
    # Each channel shrinks towards its own mean, 100 and 20, to .15 of the distance.
    assert data.corrupt(image, "contrast", 5).pixels[0, :, 0].tolist() == [[115, 85], [23, 17], [23, 17]]
    noise = data.corrupt(
        Split(torch.full((400, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(400), *grey_stats()), "noise", 3
    )
    assert float(noise.pixels.float().std()) == pytest.approx(255 * 0.08, rel=0.02)


def grey_stats():
    return torch.zeros(1), torch.ones(1)


def test_other_images(split, tmp_path):
    noise = data.out_of_distribution(split, "noise", tmp_path)
    assert noise.pixels.float().mean() == pytest.approx(127.5, abs=3)
    permuted = data.out_of_distribution(split, "permuted", tmp_path)
    assert not torch.equal(permuted.pixels, split.pixels)
    for a, b in zip(permuted.pixels, split.pixels, strict=True):  # the same colours, elsewhere
        assert sorted(map(tuple, a.flatten(1).T.tolist())) == sorted(map(tuple, b.flatten(1).T.tolist()))
    for found in (noise, permuted):
        assert torch.equal(found.mean, split.mean), "normalised as the network's own images"
    assert torch.equal(data.out_of_distribution(split, "noise", tmp_path).pixels, noise.pixels)


def test_bad_names_and_missing_copies_are_named(split, tmp_path):
    with pytest.raises(pl.UserError, match="unknown corruption 'blurr': did you mean blur"):
        data.corrupt(split, "blurr", 1)
    assert torch.equal(data.corrupt(split, "blur", np.int64(2)).pixels, data.corrupt(split, "blur", 2).pixels)
    for wrong in (6, 1.0):
        with pytest.raises(pl.UserError, match=f"severity must be 1 to 5, got {wrong}"):
            data.corrupt(split, "blur", wrong)
    with pytest.raises(pl.UserError, match="unknown --ood 'svnh': did you mean svhn"):
        data.out_of_distribution(split, "svnh", tmp_path)
    with pytest.raises(pl.UserError, match="has no complete copy of CIFAR100"):
        data.out_of_distribution(split, "cifar100", tmp_path)


def test_only_images_of_bytes_are_changed():
    table = Split(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3), torch.ones(3))
    for change in (lambda: data.corrupt(table, "blur", 1), lambda: data.out_of_distribution(table, "noise", "data")):
        with pytest.raises(pl.UserError, match=r"shifts need uint8 images .* these inputs are torch\.float32 \[2, 3\]"):
            change()


def test_images_of_cifar10_c(split, tmp_path):
    assert data.cifar10_c(tmp_path) == ()
    folder = cifar10_c(tmp_path)
    assert data.cifar10_c(tmp_path) == ("fog", "jpeg_compression")
    found = data.from_cifar10_c(split, tmp_path, "fog", 3)
    assert found.pixels.shape == split.pixels.shape
    assert found.pixels.dtype == torch.uint8
    assert found.pixels.flatten(1).float().mean(1).tolist() == [30.0 + i for i in range(12)]
    assert found.labels.tolist() == [i % 10 for i in range(12)]
    assert torch.equal(found.mean, split.mean)
    for severity in (0, 6):
        with pytest.raises(pl.UserError, match=f"severity must be 1 to 5, got {severity}"):
            data.from_cifar10_c(split, tmp_path, "fog", severity)
    with pytest.raises(pl.UserError, match=r"snow\.npy or labels\.npy is missing or damaged"):
        data.from_cifar10_c(split, tmp_path, "snow", 1)
    small = Split(split.pixels[..., :8, :8], split.labels, split.mean, split.std)
    with pytest.raises(pl.UserError, match=r"has images of 3×32×32, but those of the run are \(3, 8, 8\)"):
        data.from_cifar10_c(small, tmp_path, "fog", 1)
    np.save(folder / "snow.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(pl.UserError, match=r"expected snow\.npy of uint8 \[50000, 32, 32, 3\]"):
        data.from_cifar10_c(split, tmp_path, "snow", 1)


@pytest.mark.parametrize(
    ("name", "place", "suffix"),
    [("tiny_imagenet", "tiny-imagenet-200/test/images", "JPEG"), ("textures", "dtd/images/woven", "jpg")],
)
def test_unpacked_archives_of_other_images(split, name, place, suffix, tmp_path):
    with pytest.raises(pl.UserError, match="unpack the archive there or leave it out"):
        data.out_of_distribution(split, name, tmp_path)
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for i in range(30):  # grey values 0, 8, ..., of different sizes, one without colours
        Image.new("L" if i == 20 else "RGB", (40 + i, 64), 8 * i if i == 20 else (8 * i,) * 3).save(
            folder / f"{i:02}.{suffix}"
        )
    found = data.out_of_distribution(split, name, tmp_path)
    assert found.pixels.shape == split.pixels.shape
    wanted = torch.tensor([8.0 * (i * 30 // 12) for i in range(12)])
    assert (found.pixels.flatten(1).float().mean(1) - wanted).abs().max() < 2  # of JPEG
    (folder / "20.jpg").with_suffix(f".{suffix}").write_bytes(b"no image")
    with pytest.raises(pl.UserError, match=rf"20\.{suffix}"):
        data.out_of_distribution(split, name, tmp_path)
    grey = Split(split.pixels[:, :1], split.labels, *grey_stats())
    with pytest.raises(pl.UserError, match="has square colour images"):
        data.out_of_distribution(grey, name, tmp_path)
