import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import data
from pyro_lottery.data import Split


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


def test_corruptions_by_hand(split):
    grey = Split(torch.full((1, 1, 8, 8), 100, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert data.corrupt(grey, "brightness", 1).pixels.unique().tolist() == [113]  # 100 + 255·0.05
    assert data.corrupt(grey, "brightness", 5).pixels.unique().tolist() == [176]
    for kind in ("blur", "contrast", "pixelate"):
        assert data.corrupt(grey, kind, 5).pixels.unique().tolist() == [100], f"{kind} leaves an even image alone"
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
    with pytest.raises(pl.UserError, match="severity must be 1 to 5, got 6"):
        data.corrupt(split, "blur", 6)
    with pytest.raises(pl.UserError, match="unknown --ood 'svnh': did you mean svhn"):
        data.out_of_distribution(split, "svnh", tmp_path)
    with pytest.raises(pl.UserError, match="has no complete copy of CIFAR100"):
        data.out_of_distribution(split, "cifar100", tmp_path)


def test_only_images_of_bytes_are_changed():
    table = Split(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3), torch.ones(3))
    for change in (lambda: data.corrupt(table, "blur", 1), lambda: data.out_of_distribution(table, "noise", "data")):
        with pytest.raises(pl.UserError, match=r"shifts need uint8 images .* these inputs are torch\.float32 \[2, 3\]"):
            change()
