import functools

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import pyro_lottery as pl
from pyro_lottery import data
from pyro_lottery.data import arrays, statistics

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)), np.arange(12) % 3
IMAGES = RNG.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)


def made(train_x=X, train_y=Y, test_x=None, test_y=None, **options):
    """Of the training set the test set is a part, unless told."""
    return pl.data.from_tensors(
        train_x,
        train_y,
        train_x[:6] if test_x is None else test_x,
        train_y[:6] if test_y is None else test_y,
        **options,
    )


@pytest.mark.parametrize("shape", [(40, 5), (40, 3, 7), (40, 2, 6, 5), (40, 2, 3, 4, 5)])
@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int16", "int64", "uint16", ">f4", "longdouble", "uint8"]
)
def test_inputs_of_any_dimensions_are_normalised_by_the_training_sets_features(shape, dtype):
    x = RNG.uniform(0, 200, shape).astype(dtype)
    test = RNG.uniform(0, 200, (5, *shape[1:])).astype(dtype)
    found = made(x, np.arange(40) % 2, test, np.arange(5) % 2)
    axes = (0, *range(2, x.ndim))
    mean, std = (f(x.astype(np.float64), axis=axes, keepdims=True) for f in (np.mean, np.std))
    np.testing.assert_allclose(found.train[:].numpy(), (x.astype(np.float64) - mean) / std, atol=1e-6)
    np.testing.assert_allclose(found.test[:].numpy(), (test.astype(np.float64) - mean) / std, atol=1e-6)
    assert found.train[:].dtype == torch.float32
    assert (found.input_shape, found.in_channels, found.num_classes) == (shape[1:], shape[1], 2)
    native = test.astype(np.float64) if dtype in (">f4", "longdouble") else test
    np.testing.assert_allclose(found.train.normalize(torch.from_numpy(native)), found.test[:], atol=1e-6)


def test_timestamps_keep_their_seconds_and_constants_become_0():
    seconds = np.arange(1000.0)
    x = np.stack([1.7e9 + seconds, np.full(1000, 0.1), np.full(1000, 1.7e9), 1e-160 * seconds, 1e200 * seconds], 1)
    found = made(x, seconds, x + np.eye(5)[1], seconds)
    exact = (seconds - 499.5) / np.sqrt((1000**2 - 1) / 12)
    for feature in (0, 3, 4):
        np.testing.assert_allclose(found.train[:][:, feature], exact, atol=2e-7)
    assert (found.train[:][:, 1:3] == 0).all()
    assert found.test[:][:, 1].tolist() == pytest.approx([1] * 1000), (
        "neither 0 nor infinite where the test set differs"
    )


def test_uint8_keeps_rare_and_constant_features():
    x = np.zeros((100, 300), dtype=np.uint8)
    x[0, 0], x[:, 1] = 1, 7
    found = made(x, Y[np.arange(100) % 12], np.full_like(x, 9), Y[np.arange(100) % 12])
    assert found.train[:][:, 0].std(correction=0) == pytest.approx(1)
    assert found.train[:][:, 1:].abs().max() < 1e-6
    assert found.test[:][:, 1:].max() < 0.04  # of 255


def test_without_normalisation_numbers_stay_and_uint8_is_divided_by_255():
    assert torch.equal(made(normalize=False).train[:], torch.from_numpy(X).float())
    assert torch.equal(made(IMAGES, normalize=False).train[:], torch.from_numpy(IMAGES).float() / 255)
    assert made(X > 0, normalize=False).train[:].unique().tolist() == [0, 1]
    with pytest.raises(pl.UserError, match=r"train_x is about 1700000000 .* too small a difference for float32"):
        made(1.7e9 + X, normalize=False)
    constant = np.concatenate([X, np.full((12, 1), 1.7e9)], 1)
    assert made(constant, normalize=False).train[:][:, 4].unique().tolist() == [np.float32(1.7e9)]


def test_images_as_bytes_as_floats_to_255_or_to_1_and_normalised_before_are_the_same():
    of_bytes = made(IMAGES).train[:]
    for other in (IMAGES.astype(np.float32), IMAGES / 255, of_bytes, of_bytes.double().numpy()):
        torch.testing.assert_close(made(other).train[:], of_bytes, atol=2e-6, rtol=0)


def test_float_images_are_cropped_as_bytes_are():
    batches = []
    for images in (IMAGES, IMAGES.astype(np.float64)):
        split = made(images, augment="crop_flip").train
        batches.append(data.batch(split, torch.arange(12), "crop_flip", torch.Generator().manual_seed(3))[0])
    torch.testing.assert_close(*batches, atol=2e-6, rtol=0)
    assert not torch.equal(batches[0], made(IMAGES).train[:])


@pytest.mark.parametrize("x", [X, X.astype(np.float32), IMAGES, torch.from_numpy(X), X.astype(np.int64)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_later_changes_of_the_users_arrays_change_nothing(x, normalize):
    x, y, real = x + 0, Y.copy(), np.arange(12, dtype=np.float32)
    classes, values = made(x, y, normalize=normalize), made(x, real, normalize=normalize)
    before, checksum = classes.train[:].clone(), classes.checksum
    x[:], y[:], real[:] = 1, 0, 0
    assert torch.equal(classes.train[:], before)
    assert torch.equal(classes.train.targets, torch.from_numpy(Y))
    assert values.train.targets.tolist() == list(range(12))
    assert made(x, y + Y, normalize=normalize).checksum != checksum


def test_what_memory_holds_is_the_numbers_and_no_view_of_more():
    wide = np.zeros((12, 8, 8, 3), dtype=np.uint8)[::-1, ::2, ::2]
    wide.flags.writeable = False
    pixels = made(wide, channels_last=True).train.pixels
    assert pixels.is_contiguous()
    assert pixels.untyped_storage().nbytes() == pixels.numel()


def test_arrays_that_run_backwards():
    assert torch.equal(made(X[::-1], Y[::-1]).train[:], made().train[:].flip(0))
    one = made(X, Y, X[:1][::-1], Y[:1][::-1])
    assert torch.equal(one.test[:], one.train[:][:1])


def test_channels_last_is_what_the_user_says():
    last = IMAGES.transpose(0, 2, 3, 1)
    assert torch.equal(made(last, channels_last=True).train[:], made(IMAGES).train[:])
    assert made(last, channels_last=False).input_shape == (8, 8, 3)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "uint32", "uint64", "int64"])
def test_integer_labels_become_int64(dtype):
    labels = (np.arange(12) % 2).astype(dtype)
    found = made(X, labels)
    assert found.train.labels.dtype == torch.int64
    assert (found.train.labels.tolist(), found.num_classes) == ([0, 1] * 6, 2)


def test_float_targets_are_real_values_as_they_were_given():
    for y in (np.arange(12.0), RNG.normal(5, 3, (12, 2)), RNG.normal(size=(12, 2, 3)).astype(np.float16)):
        found = made(X, y)
        assert found.num_classes is None
        assert torch.equal(found.train.targets, torch.from_numpy(y.astype(np.float32)))
        part, rest = data.stratified_split(found.train, 5, seed=0)
        assert (part.targets.shape, rest.targets.shape) == ((5, *y.shape[1:]), (7, *y.shape[1:]))


def test_frames_lists_and_names_of_classes():
    frame = pd.DataFrame(X, columns=list("abcd")).assign(is_new=Y > 0)
    names = np.array(["cat", "dog", "eel"])
    found = made(frame, pd.Series(Y), classes=names, val_x=frame[3:], val_y=pd.Series(Y)[3:])
    assert (found.input_shape, found.num_classes, found.classes) == ((5,), 3, ("cat", "dog", "eel"))
    assert torch.equal(found.val[:], found.train[:][3:])
    assert torch.equal(made(X.tolist(), Y.tolist()).train[:], made().train[:])
    assert made(classes=[*names, "fox"]).num_classes == 4


def test_columns_of_targets_in_another_order_are_one_line():
    y = pd.DataFrame({"a": X[:, 0], "b": X[:, 1]})
    with pytest.raises(pl.UserError, match=r"the columns of test_y differ .* give test_y\[train_y\.columns\]"):
        pl.data.from_tensors(X, y, X, y[["b", "a"]])


def test_checksum_covers_everything_that_is_given():
    longer = np.concatenate([X, X[:1]])
    base = functools.partial(made, X, Y, X[:6], Y[:6], val_x=X[:3], val_y=Y[:3])
    changes = [
        {}, {"train_x": X + 1}, {"train_y": 2 - Y}, {"test_x": X[1:7]}, {"test_y": 2 - Y[:6]}, {"val_x": X[1:4]},
        {"val_y": 2 - Y[:3]}, {"val_x": None, "val_y": None}, {"normalize": False},
    ]  # fmt: skip
    given = dict(
        zip(
            ("train_x", "train_y", "test_x", "test_y", "val_x", "val_y"),
            (X, Y, X[:6], Y[:6], X[:3], Y[:3]),
            strict=True,
        )
    )
    found = [pl.data.from_tensors(**given | change).checksum for change in changes]
    found += [made(X.reshape(shape)).checksum for shape in ((12, 2, 2), (12, 4, 1), (12, 1, 4))]
    found += [made(longer, np.append(Y, 0)).checksum, made(X, Y.astype(float)).checksum]
    assert len(set(found)) == len(found)
    assert base().checksum == found[0]


def test_statistics_are_the_same_bits_with_several_threads():
    x, threads = torch.from_numpy(RNG.normal(size=(3000, 4, 50))), torch.get_num_threads()
    one = statistics.statistics("train_x", x)
    try:
        torch.set_num_threads(2)
        two = statistics.statistics("train_x", x)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, two))


def test_a_split_normalises_only_what_is_like_its_own():
    split = made(IMAGES).train
    assert torch.equal(split.normalize(split.inputs.numpy()), split[:])
    for other in (torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(pl.UserError, match=r"but those of the split have .*; give the same"):
            split.normalize(other)


def test_data_go_to_a_device():
    moved = made(X, val_x=X, val_y=Y).to(torch.device("meta"))
    assert {s.inputs.device.type for s in (moved.train, moved.test, moved.val)} == {"meta"}


def nan_at(place, value=np.nan):
    x = X.copy()
    x[place] = value
    return x


ONE_HOT = np.eye(3)[Y]
ODD = {
    "shapes": ({"test_x": X[:6, :3]}, r"examples of test_x have the shape \[3\], but those of train_x \[4\]"),
    "fewer labels": ({"train_y": Y[:11]}, "train_x has 12 examples, but train_y has 11 targets"),
    "fewer test labels": ({"test_y": Y[:5]}, "test_x has 6 examples, but test_y has 5 targets"),
    "one number": ({"train_y": np.int64(3), "test_y": Y}, "train_y has a single number"),
    "empty": ({"train_x": X[:0], "train_y": Y[:0], "test_x": X, "test_y": Y}, "train_x has no examples"),
    "empty test": ({"test_x": X[:0], "test_y": Y[:0]}, "test_x has no examples"),
    "no features": ({"train_x": X[:, :0]}, r"train_x has the empty shape \[12, 0\]"),
    "nan": ({"train_x": nan_at((7, 2))}, r"train_x\[7, 2\] is nan; fill or drop"),
    "inf": ({"test_x": nan_at((1, 3), -np.inf)[:6]}, r"test_x\[1, 3\] is -inf"),
    "nan as it is": ({"train_x": nan_at((7, 2)), "normalize": False}, r"train_x\[7, 2\] is nan"),
    "huge": ({"train_x": nan_at((7, 2), 1.5e308) - nan_at((3, 2), 1.5e308)}, r"train_x holds numbers up to 1\.5e\+308"),
    "huge as it is": ({"train_x": nan_at((7, 2), 1e39), "normalize": False}, r"numbers up to 1e\+39, too large for float32"),
    "huge test": ({"test_x": nan_at((1, 3), 1e300)[:6]}, r"test_x holds numbers up to 1e\+300"),
    "nan target": ({"train_y": np.where(Y == 1, np.nan, 2.0)}, r"train_y\[1\] is nan"),
    "one-hot": ({"train_y": ONE_HOT.astype(int)}, r"train_y is one-hot, \[12, 3\]; .* train_y\.argmax\(1\)"),
    "one-hot floats": ({"train_y": ONE_HOT}, "one-hot"),
    "one-hot truth": ({"train_y": ONE_HOT.astype(bool)}, "one-hot"),
    "several labels": ({"train_y": (X > 0).astype(int)}, r"integers are classes; give \[n\], or floats for .*several labels"),
    "negative": ({"train_y": np.where(Y == 2, -1, Y)}, "train_y holds the label -1"),
    "ignored": ({"test_y": np.full(6, -100)}, "test_y holds the label -100"),
    "strings": ({"train_y": np.array(["cat", "dog", "eel"])[Y]}, r"train_y holds strings \('cat'\).*searchsorted"),
    "string objects": ({"train_y": np.array(["cat", "dog", "eel"], dtype=object)[Y]}, r"train_y holds strings \('cat'\)"),
    "series": ({"train_y": pd.Series(["cat", "dog", "eel"] * 4, dtype="category")}, r"train_y holds strings \('cat'\)"),
    "column": ({"train_y": Y[:, None]}, r"train_y is int64 \[12, 1\], .*give \[n\]: train_y\[:, 0\]"),
    "maps": ({"train_y": np.zeros((12, 4, 4), int)}, r"train_y is int64 \[12, 4, 4\], and integers are classes"),
    "unseen": ({"test_y": np.array([0, 1, 2, 3, 0, 0])}, "test_y holds the label 3, which train_y does not hold"),
    "from 1": ({"train_y": Y + 1}, "labels of train_y begin at 1, but classes are 0 to 2; subtract 1"),
    "a gap": ({"train_y": Y * 2}, "train_y has labels up to 4 but no example of class 1"),
    "counts": ({"train_y": np.array([151, 75, 141, 206] * 3)}, "no example of class 0.*for real values or counts, give floats"),
    "one class": ({"train_y": Y * 0}, "one class"),
    "few names": ({"classes": ["cat", "dog"]}, "train_y holds the label 2, but classes= names 2"),
    "one text": ({"classes": "cat"}, "classes='cat'; give the names of all"),
    "a number": ({"classes": 3}, "classes=3; give the names of all"),
    "not shown": ({"classes": ["cat", "dog\n", "bird"]}, r"classes= holds 'dog\\n', with characters that cannot be shown"),
    "twice": ({"classes": ["cat", "dog", "cat"]}, "classes= holds 'cat' twice"),
    "names of values": ({"train_y": X[:, 0], "classes": ["a", "b"]}, "train_y holds floats"),
    "1-d": ({"train_x": X[:, 0]}, r"train_x has the shape \[12\], without .*: train_x\[:, None\]"),
    "HWC": ({"train_x": np.zeros((12, 32, 32, 3), np.uint8)}, r"train_x has the shape \[12, 32, 32, 3\], .*images with channels last"),
    "grey HWC": ({"train_x": np.zeros((12, 28, 28, 1))}, "images with channels last; give channels_last=True"),
    "volumes": ({"train_x": np.zeros((12, 9, 9, 9, 1))}, "images with channels last"),
    "signals": ({"train_x": np.zeros((12, 200, 3))}, "signals with channels last"),
    "grey HW": ({"train_x": np.zeros((12, 28, 28), np.uint8)}, r"grey images without .*train_x\[:, None\]"),
    "table last": ({"channels_last": True}, "of a table; channels_last=True is for images and signals only"),
    "complex": ({"train_x": X + 1j}, "train_x holds complex numbers"),
    "complex tensor": ({"train_x": torch.from_numpy(X + 1j)}, "train_x holds complex numbers"),
    "objects": ({"train_x": np.array([[None, 1]] * 12)}, "not a number .*None"),
    "missing": ({"train_x": pd.DataFrame({"a": pd.array([1, None] * 6, "Int64")})}, r"train_x\[1, 0\] is nan"),
    "missing label": ({"train_y": pd.Series([1, None, 0] * 4, dtype="Int64")}, r"train_y\[1\] is nan|not a number .*<NA>"),
    "ragged": ({"train_x": [[1, 2], [3]] * 6}, "train_x is not an array"),
    "dates": ({"train_x": np.array(["2024-01-01"] * 12, "M8[s]")[:, None]}, "dates or times"),
    "sparse": ({"train_x": scipy.sparse.csr_array(X)}, r"train_x is a csr_array; .*\.toarray\(\)"),
    "sparse tensor": ({"train_x": torch.from_numpy(X).to_sparse(), "test_x": X}, r"a tensor of torch\.sparse_coo.*dense"),
    "nested": ({"train_x": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "test_x": X}, "give a dense tensor"),
    "meta": ({"train_x": torch.from_numpy(X).to("meta")}, "on meta; give a dense tensor"),
    "masked": ({"train_x": np.ma.masked_less(X, 0)}, "train_x has masked entries"),
    "a data set": ({"train_x": torch.utils.data.TensorDataset(torch.zeros(12, 2))}, "train_x is a TensorDataset; .*from_loaders"),
    "nothing": ({"train_y": None, "test_y": Y}, "train_y is a NoneType"),
    "tensors": ({"train_x": list(torch.zeros(12, 2))}, r"list of tensors; .*torch\.stack\(train_x\)"),
    "uint64": ({"train_x": X.astype(np.uint64) + np.uint64(2**63)}, r"beyond 2\^63"),
    "bytes and floats": ({"train_x": IMAGES, "test_x": IMAGES[:6] / 255}, "test_x is float64, but train_x is uint8"),
    "classes and values": ({"test_y": Y[:6] / 2}, "test_y is float64, but train_y is int64"),
    "values of two shapes": ({"train_y": X, "test_y": X[:6, :2]}, r"targets of test_y have the shape \[2\], but those of train_y \[4\]"),
    "no values": ({"train_y": X[:, :0]}, r"train_y has the empty shape \[12, 0\]"),
    "coarse": ({"train_y": 1.7e9 + X[:, 0]}, "train_y is about 1700000000 .* too small a difference for float32"),
    "order": ({"train_y": X[:6], "test_x": Y, "test_y": Y[:6]}, "the order is train_x, train_y, test_x, test_y"),
    "columns": ({"train_x": pd.DataFrame(X), "test_x": pd.DataFrame(X[:6])[[1, 0, 2, 3]]}, r"test_x\[train_x\.columns\]"),
    "rows": ({"train_x": pd.DataFrame(X), "train_y": pd.Series(Y)[::-1]}, r"the same index in different orders"),
    "validation": ({"val_x": X}, "val_x and val_y belong together"),
    "crop": ({"augment": "crop"}, r"augment='crop' is for images .*inputs are \[12, 4\]"),
    "rotate": ({"augment": "rotate"}, "unknown augment 'rotate'"),
}  # fmt: skip


@pytest.mark.parametrize("row", ODD)
def test_whatever_is_odd_is_one_line(row):
    given, message = ODD[row]
    with pytest.raises(pl.UserError, match=message) as raised:
        made(**given)
    assert "\n" not in str(raised.value)


def test_data_that_memory_does_not_hold_are_refused(monkeypatch):
    monkeypatch.setattr(arrays, "memory", lambda: 18 * 4 * 4 - 1)
    with pytest.raises(pl.UserError, match=r"the data need 0\.0 GiB"):
        made()
