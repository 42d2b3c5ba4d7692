import functools
import hashlib
import http.server
import itertools
import os
import pickle
import resource
import tarfile
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import pyro_lottery as pl
from pyro_lottery import data, files, training, untrusted
from tests.support import tree


def test_digits_are_the_published_ones():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1437, 360, 10)
    assert (digits.in_channels, digits.image_size, digits.augment) == (1, (8, 8), "none")
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.train.pixels.max() == 255


def test_normalised_training_images_have_mean_0_and_std_1():
    images = data.load("digits").train[:]
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_crop_and_flip_take_each_image_from_its_padded_self():
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (64, 2, 6, 6), dtype=torch.uint8)
    out = data.crop_and_flip(pixels, 2, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    found = []
    for i in range(64):
        candidates = {
            (dy, dx, flip): (w.flip(-1) if flip else w)
            for dy in range(5) for dx in range(5) for flip in (False, True)
            for w in [(padded[i, :, dy : dy + 6, dx : dx + 6])]
        }  # fmt: skip
        hits = [key for key, window in candidates.items() if torch.equal(window, out[i])]
        assert len(hits) == 1
        found += hits
    assert len({(dy, dx) for dy, dx, _ in found}) > 15
    assert {flip for *_, flip in found} == {False, True}


def test_no_padding_and_no_flip_change_nothing():
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(data.crop_and_flip(pixels, 0, False, torch.Generator()), pixels)


def test_an_epoch_holds_every_example_once_in_a_seeded_order():
    generators = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    epochs = [torch.cat(data.shuffle(10, 4, g)) for g in generators]
    assert sorted(epochs[0].tolist()) == list(range(10))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


@pytest.mark.parametrize(("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1])])
def test_no_batch_of_one(count, sizes):
    assert [len(c) for c in data.shuffle(count, 4, torch.Generator())] == sizes
    assert training.steps_per_epoch(count, 4) == len(sizes)


def test_batches_are_counted_as_they_are_made():
    for count, size, least in itertools.product(range(1, 30), range(1, 9), (1, 2, 4)):
        batches = data.shuffle(count, size, torch.Generator(), least)
        assert training.steps_per_epoch(count, size, least) == len(batches)
        assert sum(map(len, batches)) == count


def test_stratified_parts_keep_the_proportions():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = data.Split(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), labels, torch.zeros(1), torch.ones(1))
    part, rest = data.stratified_split(split, 50, seed=1)
    assert part.labels.bincount().tolist() == [30, 15, 5]
    assert rest.labels.bincount().tolist() == [30, 15, 5]


def test_float_inputs_of_a_split_are_normalised_once_and_others_by_its_mean_and_std():
    given = torch.tensor([[1.7e9, 1.0], [1.7e9 + 2, 5.0]], dtype=torch.double)
    mean, std = given.mean(0), given.std(0, correction=0)
    split = data.Split(((given - mean) / std).float(), torch.tensor([0.5, 2.5]), mean, std)
    assert split[:].tolist() == [[-1, -1], [1, 1]] == split.normalize(given).tolist()
    x, y = data.batch(split, torch.tensor([1]), "none", torch.Generator())
    assert (x.tolist(), y.tolist()) == ([[1, 1]], [2.5])
    whole = data.Data(split, split, None, None, "none", 0)
    assert (whole.input_shape, whole.in_channels, whole.num_classes) == ((2,), 2, None)
    with pytest.raises(pl.UserError, match=r"examples have the shape \(2,\) and are not images"):
        _ = whole.image_size


def test_test_size_takes_the_same_stratified_images_whatever_the_seed():
    first, second = (data.load("digits", test_size=100, seed=seed) for seed in (0, 1))
    assert len(first.test) == 100
    assert torch.equal(first.test.pixels, second.test.pixels)
    counts = first.test.labels.bincount()
    full = data.load("digits").test.labels.bincount()
    assert (abs(counts - full * 100 / full.sum()) <= 1).all()
    with pytest.raises(pl.UserError, match="--test-size 361: the test set has 360 images"):
        data.load("digits", test_size=361)


def test_train_size_and_validation():
    digits = data.load("digits", train_size=500, val_fraction=0.1, seed=3)
    assert (len(digits.train), len(digits.val), len(digits.test)) == (450, 50, 360)
    again = data.load("digits", train_size=500, val_fraction=0.1, seed=3)
    assert torch.equal(digits.val.pixels, again.val.pixels)
    with pytest.raises(pl.UserError, match="--train-size 1438"):
        data.load("digits", train_size=1438)


def test_folder_reads_the_pixels_and_keeps_them_decoded(tmp_path, monkeypatch):
    root = tree(tmp_path)
    first = data.load("folder", root)
    image = np.array(Image.open(root / "train" / "dog" / "1.png"))
    assert torch.equal(first.train.pixels[4], torch.from_numpy(image).permute(2, 0, 1))
    assert first.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.augment == "crop_flip"
    monkeypatch.setattr(Image, "open", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(data.load("folder", root).train.pixels, first.train.pixels)


def test_folder_decodes_again_when_an_image_changes_or_the_cache_is_damaged(tmp_path):
    root = tree(tmp_path, mode="L")
    assert data.load("folder", root).in_channels == 1
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(root / "test" / "cat" / "0.png")
    assert (data.load("folder", root).test.pixels[0] == 7).all()
    cache = root / "pyro_lottery.safetensors"
    cache.write_bytes(cache.read_bytes()[:-1])
    assert (data.load("folder", root).test.pixels[0] == 7).all()
    untrusted.load_tensors(cache)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "test").rename(r / "tset"), "no folder test/"),
        (lambda r: (r / "train" / "cat" / "0.png").write_bytes(b"not an image"), r"cat/0\.png is not a readable image"),
        (lambda r: Image.new("RGB", (5, 4)).save(r / "train" / "dog" / "2.png"), r"dog/2\.png has 5×4 pixels"),
        (lambda r: (r / "test" / "cow").mkdir(), "cow is not a class folder of train/"),
        (lambda r: [p.unlink() for p in (r / "train").rglob("*.png")], "has no images"),
    ],
)
def test_folder_names_what_is_wrong(tmp_path, spoil, message):
    spoil(tree(tmp_path))
    with pytest.raises(pl.UserError, match=message):
        data.load("folder", tmp_path)
    assert not (tmp_path / "pyro_lottery.safetensors").exists()


def test_folder_refuses_test_images_of_another_size(tmp_path):
    with pytest.raises(pl.UserError, match=r"test/cat/0\.png has 5×5 pixels, but .*train/cat/0\.png has 4×4"):
        data.load("folder", tree(tmp_path, sizes=((4, 4), (5, 5))))


def cifar(root, monkeypatch):
    """A CIFAR-10 in torchvision's format, four images a file, whose hashes torchvision is told to expect."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        meta = {"label_names": list("abcdefghij")}
        (folder / name).write_bytes(pickle.dumps(meta if name == "batches.meta" else batch))
    hashes = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in names}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, hashes[n]] for n in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", hashes["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashes["batches.meta"]},
    )  # fmt: skip
    return folder


def test_an_existing_cifar_never_touches_the_network(tmp_path, monkeypatch):
    cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was touched"))
    loaded = data.load("cifar10", tmp_path)
    assert loaded.train.pixels.shape == (20, 3, 32, 32)
    assert loaded.test.labels.tolist() == [0, 1, 2, 9]
    assert loaded.augment == "crop_flip"


@pytest.fixture
def web():
    """Serves a folder on this machine's loopback address."""
    servers = []

    def serve(folder):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # older torchvision
def test_a_download_is_checked_and_unpacked(tmp_path, monkeypatch, web):
    folder = cifar(tmp_path / "server", monkeypatch)
    archive = tmp_path / "server" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{web(archive.parent)}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.load("cifar10", tmp_path / "user").train) == 20
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(pl.UserError, match="has no complete copy"):
        data.load("cifar10", tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python"), ("svhn", "train_32x32")]
)
def test_no_network_names_the_file_that_is_wanted(tmp_path, monkeypatch, name, archive):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(pl.UserError, match=rf"--dataset {name}: .*unreachable.*put {archive}.* there"):
        data.load(name, tmp_path)


def test_unknown_names():
    with pytest.raises(pl.UserError, match="did you mean cifar10"):
        data.load("cifar")
    with pytest.raises(pl.UserError, match="unknown augment"):
        data.load("digits", augment="rotate")


@pytest.mark.parametrize("size", [(5000, 5000), (10_000, 10_000), (20_000, 20_000)])
def test_a_small_file_that_decodes_to_gigabytes_is_refused(size, tmp_path):
    root = tree(tmp_path)
    path = root / "train" / "cat" / "0.png"
    Image.new("L", size).save(path)
    assert path.stat().st_size < 500_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pl.UserError, match=r"cat/0\.png is not a readable image \(.*pixels"):
        data.load("folder", root)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, "KiB: 5,000×5,000 pixels of three channels are 73,000"


def test_a_script_under_the_name_of_an_image_is_not_run(tmp_path):
    root = tree(tmp_path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n{} loop\n%%EOF\n"
    (root / "train" / "cat" / "0.png").write_bytes(eps)
    with pytest.raises(pl.UserError, match=r"0\.png is not a readable image \(it is none of PNG"):
        data.load("folder", root)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_lottery.data.images.memory", lambda: 12 * 4 * 4 * 3 - 1)
    monkeypatch.setattr("pyro_lottery.data.images.decode", lambda *a: pytest.fail("decoded"))
    with pytest.raises(pl.UserError, match=r"12 images of 3×4×4 need 0\.0 GiB of memory, but there are .*--image-size"):
        data.load("folder", tree(tmp_path))


@pytest.mark.parametrize("labels", [[-1] * 6, [7] * 6, [0.0] * 6, [0] * 5])
def test_a_cache_that_holds_no_labelled_images_is_made_again(labels, tmp_path):
    root = tree(tmp_path)
    first = data.load("folder", root)
    cache = root / "pyro_lottery.safetensors"
    tensors, info = untrusted.load_tensors(cache)
    files.save_tensors(cache, tensors | {"train/labels": torch.tensor(labels)}, info)
    assert torch.equal(data.load("folder", root).train.labels, first.train.labels)


def test_a_cache_that_cannot_be_read_is_done_without(tmp_path):
    root = tree(tmp_path)
    (root / "pyro_lottery.safetensors").mkdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(data.load("folder", root).train) == 6


def test_a_pipe_among_the_images_is_named(tmp_path):
    tree(tmp_path, sizes=((8, 8), (8, 8)))
    pipe = next((tmp_path / "train").glob("*/*"))
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(pl.UserError, match="not a regular file"):
        pl.data.load("folder", tmp_path)
