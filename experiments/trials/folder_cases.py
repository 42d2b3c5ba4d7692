"""Folders of images as people have them, and what ``--dataset folder`` must read from each."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from experiments.trials.folders import (
    EPS,
    GIT_LFS,
    STEPS,
    WIDE,
    Build,
    after_reading,
    array,
    beside,
    every,
    first,
    first_half,
    frames,
    like_before,
    link,
    moved,
    other,
    pgm,
    plain,
    png16,
    save,
    swap,
    text_beside,
    tiny_imagenet,
    turned,
    with_,
)


@dataclass(frozen=True)
class Outcome:
    """What is read, by class: an image of one value as that value, others by row or by colour; or why nothing is."""

    train: str = ""
    test: str = ""
    says: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Case:
    """A folder, and what comes of it. ``DIR`` stands for it."""

    name: str
    build: Build
    expected: Outcome
    image_size: int | None = None


USUAL = Outcome("cat 10 20, dog 30 40", "cat 50, dog 60")
BRIGHT = Outcome("cat 40 80, dog 120 160", "cat 200, dog 240")


def usual(*says: str, train: str = USUAL.train, test: str = USUAL.test) -> Outcome:
    """The plain folder's images, with what is said of them."""
    return Outcome(train, test, says)


def refused(line: str) -> Outcome:
    """One line in place of the images."""
    return Outcome(error=line)


def unreadable(file: str, why: str) -> Outcome:
    """The line that names a file."""
    return refused(f"DIR/train/{file} is not a readable image ({why}); repair or remove it")


NO_FOLDER = "--dataset folder reads train/CLASS/FILE and test/CLASS/FILE"
FORMATS = "it is none of PNG, JPEG, BMP, GIF, WEBP, PPM, TIFF"
SIZES = "give images of one size, or --image-size N to crop all of them to N×N"
RANGES = "expected 0 to 1, 0 to 255 or 0 to 65,535 in all of them; rescale them or save them with 8 bits"
TRANSPARENT = "transparency is ignored in 1 image; the colours beneath are read"
FRAMES = "only the first frame is read of 1 image with several frames"

CASES = [
    # What is where
    Case("train/CLASS/FILE and test/CLASS/FILE", plain, USUAL),
    Case("train/ is a link", with_(lambda r: ((r / "train").rename(r / "here"), (r / "train").symlink_to("here"))), USUAL),
    Case("a class is a link", with_(lambda r: ((r / "train/cat").rename(r / "here"), (r / "train/cat").symlink_to("../here"))), USUAL),
    Case("an image is a link", with_(lambda r: ((r / "train/cat/10.png").rename(r / "10"), (r / "train/cat/10.png").symlink_to("../../10"))), USUAL),
    Case("`train/.ipynb_checkpoints/`", beside("train/.ipynb_checkpoints/1.png"), USUAL),
    Case("`.ipynb_checkpoints/` within a class", beside("train/cat/.ipynb_checkpoints/1.png"), USUAL),
    Case("`._10.png`, of macOS", text_beside("train/cat/._10.png", "train/._cat"), USUAL),
    Case("`.DS_Store`, `Thumbs.db`, `desktop.ini`", text_beside("train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db", "test/dog/desktop.ini"), USUAL),
    Case("`@eaDir/`, of a network disk", with_(lambda r: [save(r / p, 99) for p in ("train/@eaDir/1.png", "train/cat/@eaDir/1.png", "test/@eaDir/1.png")]), USUAL),
    Case("`__MACOSX/`, of a zip", with_(lambda r: [save(r / p, 99) for p in ("__MACOSX/train/cat/1.png", "train/__MACOSX/cat/1.png")]), USUAL),
    Case("a hidden folder that may be a class", beside("train/.38/1.png"), usual("hidden folders in train/ are not read as classes: .38")),
    Case("upper-case suffixes", moved("train/cat/10.png", "train/cat/10.PNG"), USUAL),
    Case("a PNG named .jpg", moved("train/cat/10.png", "train/cat/10.jpg"), USUAL),
    Case("HEIC files", text_beside("train/cat/a.heic", "train/cat/b.HEIC", "train/dog/c.heic"), usual("3 files with .heic in train/ are not read")),
    Case("files of no known suffix", text_beside("test/cat/labels.csv", "test/dog/README"), usual("1 file without suffix, 1 file with .csv in test/ are not read")),
    Case("an image beside the classes", beside("train/1.png"), usual("1 image directly in train/ has no class and is not read")),
    Case("images without classes", with_(lambda r: [(r / "train/cat" / f).rename(r / "train" / f) for f in ("10.png", "20.png")] and [(r / "train/dog" / f).rename(r / "train" / f) for f in ("30.png", "40.png")]), refused("DIR/train has images, but not in class folders; expected DIR/train/CLASS/FILE")),
    Case("`train/CLASS/images/FILE`", moved("train/cat/10.png", "train/cat/images/10.png"), usual(train="cat 20 10, dog 30 40")),
    Case("folders within a class", moved("train/cat/10.png", "train/cat/indoors/10.png"), usual("images in subfolders of a class folder belong to that class: cat/indoors", train="cat 20 10, dog 30 40")),
    Case("classes one folder too deep", with_(lambda r: [(r / "train" / c).rename((r / "train/images").mkdir(exist_ok=True) or r / "train/images" / c) for c in ("cat", "dog")]), refused("DIR/train has images of one class, images; a classifier needs at least two; if cat, dog are the classes, move them to DIR/train")),
    Case("one class", with_(lambda r: [p.unlink() for p in (r / "train/dog").iterdir()]), refused("DIR/train has images of one class, cat; a classifier needs at least two")),
    Case("Tiny ImageNet", tiny_imagenet("val_60.JPEG\tn01\t0\t0\t1\t1\nval_50.JPEG\tn02\t0\t0\t1\t1\n"), Outcome("n01 10 20, n02 30 40", "n01 60, n02 50", ("2 files with .txt in train/ are not read", "test/ has no class folders, so val/ is read as the test set"))),
    Case("Tiny ImageNet, an image without a label", tiny_imagenet("val_60.JPEG\tn01\n"), Outcome("n01 10 20, n02 30 40", "n01 60, n02", ("2 files with .txt in train/ are not read", "test/ has no class folders, so val/ is read as the test set", "1 image in val/images/ is not read, since val_annotations.txt does not list it"))),
    Case("Tiny ImageNet, a label that is no class", tiny_imagenet("val_60.JPEG\tn03\n"), refused("DIR/val/val_annotations.txt, line 1 is 'val_60.JPEG\\tn03'; expected a file in val/images/ (once only), a tab and a class folder of train/")),
    Case("Tiny ImageNet, a label without an image", tiny_imagenet("val_70.JPEG\tn01\n"), refused("DIR/val/val_annotations.txt, line 1 is 'val_70.JPEG\\tn01'; expected a file in val/images/ (once only), a tab and a class folder of train/")),
    Case("an empty class in the middle", with_(lambda r: [(r / p).mkdir() for p in ("train/cow", "test/cow")]), usual("train/ has no images of the class cow", "test/ has no images of the class cow", train="cat 10 20, cow, dog 30 40", test="cat 50, cow, dog 60")),
    Case("an empty class at the end", with_(lambda r: (r / "train/emu").mkdir()), usual("train/ has no images of the class emu", "test/ has no images of the class emu", train="cat 10 20, dog 30 40, emu", test="cat 50, dog 60, emu")),
    Case("a class without test images", with_(lambda r: ((r / "test/cat/50.png").unlink(), (r / "test/cat").rmdir())), usual("test/ has no images of the class cat", test="cat, dog 60")),
    Case("a class in test/ alone", beside("test/cow/1.png"), refused("DIR/test/cow is not a class folder of train/; both need the same class folders")),
    Case("a class of another spelling in test/", moved("test/dog", "test/dogs"), refused("DIR/test/dogs is not a class folder of train/; both need the same class folders; did you mean dog?")),
    Case("val/ in place of test/", moved("test", "val"), usual("there is no test/, so val/ is read as the test set")),
    Case("val/ beside test/", beside("val/cat/1.png"), usual("val/ is not read; use --val-fraction to hold out training images")),
    Case("test/ without classes, val/ with", with_(lambda r: ((r / "test").rename(r / "val"), save(r / "test/1.png", 9))), usual("test/ has no class folders, so val/ is read as the test set")),
    Case("test images without classes", with_(lambda r: [p.rename(r / "test" / p.name) for p in sorted((r / "test").glob("*/*"))]), refused("DIR/test has images, but not in class folders; expected DIR/test/CLASS/FILE")),
    Case("no test set", moved("test", "tset"), refused(f"--data-dir DIR has no folder test/, only train/, tset/; {NO_FOLDER}")),
    Case("Train/ and Test/", with_(lambda r: [(r / p).rename(r / p.title()) for p in ("train", "test")]), refused(f"--data-dir DIR has no folder train/, only Test/, Train/; {NO_FOLDER}")),
    Case("the folder above", with_(lambda r: [(r / p).rename((r / "pets").mkdir(exist_ok=True) or r / "pets" / p) for p in ("train", "test")]), refused(f"--data-dir DIR has no folder train/, but pets/train/; did you mean --data-dir DIR/pets? {NO_FOLDER}")),
    Case("an empty folder", lambda r: None, refused(f"--data-dir DIR has no folder train/; {NO_FOLDER}")),
    Case("no folder", lambda r: r.rmdir(), refused(f"--data-dir DIR has no folder train/; {NO_FOLDER}")),
    Case("a file in place of train/", lambda r: ((r / "train").write_text(""), (r / "test").mkdir()), refused(f"--data-dir DIR has no folder train/, only test/; {NO_FOLDER}")),
    Case("classes without images", with_(lambda r: [p.unlink() for p in (r / "train").glob("*/*")]), refused("DIR/train has no images; expected DIR/train/CLASS/FILE with one of .bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp")),
    # Names and links
    Case("a file name that is not UTF-8", moved("train/cat/10.png", os.fsdecode(b"train/cat/1\xff0.png")), USUAL),
    Case("a class name that is not UTF-8", with_(lambda r: [(r / p / "cat").rename(r / p / os.fsdecode(b"c\xe9t")) for p in ("train", "test")]), Outcome("c\\xe9t 10 20, dog 30 40", "c\\xe9t 50, dog 60")),
    Case("a class name with a line break", with_(lambda r: [(r / p / "cat").rename(r / p / "c\nt") for p in ("train", "test")]), Outcome("c\\nt 10 20, dog 30 40", "c\\nt 50, dog 60")),
    Case("a link back to the class", link("train/cat/again", "."), refused("DIR/train/cat/again is a link to a folder that contains it; remove the link")),
    Case("a class that is a link to itself", link("train/cow", "cow"), USUAL),
    Case("an image that is a link to itself", link("train/cat/1.png", "1.png"), unreadable("cat/1.png", "not a regular file")),
    Case("a link to nothing", link("train/cat/1.png", "gone.png"), unreadable("cat/1.png", "not a regular file")),
    Case("a pipe", with_(lambda r: os.mkfifo(r / "train/cat/1.png")), unreadable("cat/1.png", "not a regular file")),
    # Files
    Case("an empty file", first(b""), unreadable("cat/10.png", "the file is empty")),
    Case("text", first(b"text"), unreadable("cat/10.png", FORMATS)),
    Case("an EPS script named .png", first(EPS), unreadable("cat/10.png", FORMATS)),
    Case("a pointer of Git LFS", first(GIT_LFS), unreadable("cat/10.png", "it is a Git LFS pointer; run git lfs pull to fetch the image")),
    Case("half a PNG", first_half(".png"), unreadable("cat/10.png", "the file is truncated")),
    Case("half a JPEG", first_half(".jpg"), unreadable("cat/10.png", "the file is truncated")),
    Case("sizes differ", other(0, size=(3, 2)), refused(f"DIR/train/cat/20.png has 2×2 pixels, but DIR/train/cat/10.png has 3×2; {SIZES}")),
    Case("the test images' size differs", with_(lambda r: save(r / "test/dog/60.png", 60, size=(2, 3))), refused(f"DIR/test/dog/60.png has 2×3 pixels, but DIR/train/cat/10.png has 2×2; {SIZES}")),
    Case("sizes differ, `--image-size 2`", other(10, size=(7, 3)), USUAL, 2),
    Case("a wide image, `--image-size 2`", other(WIDE, ""), usual(train="cat 90 20, dog 30 40"), 2),
    Case("17 million pixels", first(b"P4 4097 4096\n"), unreadable("cat/10.png", "it has 4097×4096 pixels, more than 16,777,216; --image-size N reads larger ones")),
    Case("17 million pixels, `--image-size 2`", other(Image.new("1", (4097, 4096), 1)), usual(train="cat 255 20, dog 30 40"), 2),
    Case("100 million pixels, `--image-size 2`", first(b"P4 10000 10000\n"), unreadable("cat/10.png", "it has more than 67,108,864 pixels"), 2),
    # Kinds of pixels
    Case("grey, and colours", other(STEPS), usual(train="cat [0,50/100,150] 20, dog 30 40")),
    Case("16-bit PNG, white 65,535", other(np.array([[0, 257], [32_896, 65_535]], dtype=np.uint16)), usual(train="cat [0,1/128,255] 20, dog 30 40")),
    Case("16-bit PNG, all of 12 bits", every(array(np.uint16, lambda grey: 64 * grey)), usual("6 images of 16 bits with no value above 3,840 will be dark, since white is 65,535", train="cat 2 5, dog 7 10", test="cat 12, dog 15")),
    Case("16-bit PNG in colours", first(png16(257, 32_896, 65_535)), usual(train="cat (1,128,255) 20, dog 30 40")),
    Case("16-bit PGM", first(pgm([0, 257, 32_896, 65_535], 65_535)), usual(train="cat [0,1/128,255] 20, dog 30 40")),
    Case("PGM, white 100", first(pgm([0, 50, 75, 100], 100)), usual(train="cat [0,128/191,255] 20, dog 30 40")),
    Case("16-bit TIFF", every(array(np.uint16, lambda grey: 1028 * grey), ".tif"), BRIGHT),
    Case("16-bit TIFF, most significant byte first", every(array(">u2", lambda grey: 1028 * grey), ".tif"), BRIGHT),
    Case("float TIFF, 0 to 1", every(array(np.float32, lambda grey: grey / 60), ".tif"), usual("6 images have float or 32-bit values, which range from 0.166667 to 1; 1 is read as white", train="cat 42 85, dog 128 170", test="cat 212, dog 255")),
    Case("float TIFF, 0 to 255", every(array(np.float32), ".tif"), usual("6 images have float or 32-bit values, which range from 10 to 60; 255 is read as white")),
    Case("float TIFF, 0 to 65,535", every(array(np.float32, lambda grey: 257 * grey), ".tif"), usual("6 images have float or 32-bit values, which range from 2570 to 15420; 65,535 is read as white")),
    Case("float TIFF, below 0", every(array(np.float32, lambda grey: grey / 60 - 0.5), ".tif"), refused(f"6 images have float or 32-bit values, which range from -0.333333 to 0.5; {RANGES}")),
    Case("float TIFF with a NaN", other(np.full((2, 2), np.nan, dtype=np.float32), suffix=".tif"), refused(f"1 image has float or 32-bit values, which are not all finite; {RANGES}")),
    Case("one float TIFF of 0 to 1, one of 0 to 65,535", with_(lambda r: [save(r / "train/cat" / f"{n}.tif", np.full((2, 2), v, dtype=np.float32)) for n, v in (("1", 1.0), ("2", 65_535.0))]), usual("2 images have float or 32-bit values, which range from 1 to 65535; 65,535 is read as white", train="cat 0 10 255 20, dog 30 40")),
    Case("32-bit TIFF, 0 to 65,535", every(array(np.int32, lambda grey: 257 * grey), ".tif"), usual("6 images have float or 32-bit values, which range from 2570 to 15420; 65,535 is read as white")),
    Case("32-bit TIFF, above 65,535", every(array(np.int32, lambda grey: 10_000 * grey), ".tif"), refused(f"6 images have float or 32-bit values, which range from 100000 to 600000; {RANGES}")),
    Case("1 bit", other(np.array([[True, False], [False, True]])), usual(train="cat [255,0/0,255] 20, dog 30 40")),
    Case("a palette", other(Image.fromarray(np.full((2, 2, 3), (10, 200, 30), dtype=np.uint8)).quantize(4)), usual(train="cat (10,200,30) 20, dog 30 40")),
    Case("CMYK", other((0, 0, 0, 245), "CMYK", ".tif"), USUAL),
    Case("transparent in places", other((10, 10, 10, 0), "RGBA"), usual(TRANSPARENT)),
    Case("an alpha channel, opaque", other((10, 10, 10, 255), "RGBA"), USUAL),
    Case("grey with transparency", other((10, 7), "LA"), usual(TRANSPARENT)),
    Case("a transparent colour of a palette", other(0, "P", ".gif", transparency=0), usual(TRANSPARENT, train="cat 0 20, dog 30 40")),
    Case("EXIF: turned by a quarter", other(STEPS, exif=turned(6)), usual(train="cat [100,0/150,50] 20, dog 30 40")),
    Case("EXIF: mirrored", other(STEPS, exif=turned(2)), usual(train="cat [50,0/150,100] 20, dog 30 40")),
    Case("EXIF in a TIFF", other(STEPS, suffix=".tif", exif=turned(3)), usual(train="cat [150,100/50,0] 20, dog 30 40")),
    Case("EXIF: upright beside turned", with_(lambda r: [save(p, 10, size=(2, 4)) for p in r.rglob("*.png")] and save(r / "train/cat/10.png", 20, size=(4, 2), exif=turned(8))), usual(train="cat 20 10, dog 10 10", test="cat 10, dog 10")),
    Case("an animated GIF", other(10, "L", ".gif", **frames(99)), usual(FRAMES)),
    Case("a TIFF of two pages", other(10, "L", ".tif", **frames(99)), usual(FRAMES)),
    # What lies beside them from the last time
    Case("read again", after_reading(lambda r: None), USUAL),
    Case("read again: swapped, sizes and times alike", after_reading(swap), usual(train="cat 40 20, dog 30 10")),
    Case("read again: replaced, size and time alike", after_reading(lambda r: like_before(r / "test/cat/50.png", (r / "test/dog/60.png").read_bytes())), usual(test="cat 60, dog 60")),
    Case("read again: renamed", after_reading(lambda r: (r / "train/cat/10.png").rename(r / "train/cat/30.png")), usual(train="cat 20 10, dog 30 40")),
    Case("read again: moved to another class", after_reading(lambda r: (r / "train/cat/20.png").rename(r / "train/dog/20.png")), usual(train="cat 10, dog 20 30 40")),
    Case("read again: classes renamed", after_reading(lambda r: [(r / p / "cat").rename(r / p / "eel") for p in ("train", "test")]), Outcome("dog 30 40, eel 10 20", "dog 60, eel 50")),
    Case("read again: another `--image-size`", after_reading(lambda r: None, 1), USUAL, 2),
    Case("read again: what was kept is damaged", after_reading(lambda r: (r / "pyro_lottery.safetensors").write_bytes(b"x")), USUAL),
]  # fmt: skip
