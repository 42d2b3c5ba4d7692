"""What a folder of images holds: its classes, their image files, and what is no data."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyro_lottery import files
from pyro_lottery.errors import UserError

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
}  # fmt: skip
TESTS = ("test", "val", "valid", "validation")
"""Folders that are read as the test set, the first that has classes."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's: a file's name and its class a line, with tabs; the files are in ``images/`` beside it."""
_JUNK = {
    "@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found", "__pycache__",
}  # fmt: skip
_HIDDEN = re.compile(r"\.(_.*|ipynb_checkpoints|ds_store|git|svn|cache|thumbnails|trash.*|spotlight.*|fseventsd)", re.I)
"""Hidden folders that nobody takes for classes."""


@dataclass(frozen=True)
class Tree:
    """The image files of a data set."""

    classes: tuple[str, ...]
    """Names of the class folders, in the order of their labels."""
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    """Image files with their labels, ordered by label and name."""
    notes: list[str]
    """What else a user should know: what is not read, or not as might be expected."""

    @property
    def files(self) -> list[tuple[Path, int]]:
        """Those of both parts."""
        return [*self.train, *self.test]


def read(root: Path) -> Tree:
    """The classes of ``root/train``, and its image files and those of ``root/test``; ``UserError`` for what is no data set."""
    notes: list[str] = []
    if not (root / "train").is_dir():
        raise _missing(root, "train")
    names = _folders(root / "train", notes)
    train = _listed(root / "train", names, notes)
    if len({label for _, label in train}) < 2:
        raise _one_class(root / "train", names)
    chosen = _test_folder(root, names, notes)
    if (root / chosen / ANNOTATIONS).is_file():
        test = _annotated(root / chosen, names, notes)
    else:
        _check_known(root / chosen, _folders(root / chosen, notes), names)
        test = _listed(root / chosen, names, notes)
    return Tree(tuple(map(shown, names)), train, test, notes)


def shown(name: object) -> str:
    r"""A file's name as text: bytes that are no UTF-8, and what cannot be printed, as escapes.

    >>> shown("caf\udce9"), shown("a\nb")
    ('caf\\xe9', 'a\\nb')
    """
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()  # a link may lead round in a circle


def _folders(part: Path, notes: list[str]) -> list[str]:
    """Names of the folders in ``part`` that are classes, sorted."""
    with os.scandir(part) as entries:
        every = sorted(entry.name for entry in entries if _is_folder(entry))
    odd = [name for name in every if name.startswith(".") and not _HIDDEN.fullmatch(name)]
    if odd:
        notes.append(f"hidden folders in {part.name}/ are no classes: {', '.join(map(shown, odd))}")
    return [name for name in every if not _is_hidden(name)]


def _listed(part: Path, names: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    """The images of all classes in ``part``; what is no image, or lies oddly, is noted."""
    ignored, nested = Counter[str](), list[str]()
    listed = [
        (path, label)
        for label, name in enumerate(names)
        if (part / name).is_dir()
        for path in _images(part / name, ignored, nested, [])
    ]
    loose = sum(path.suffix.lower() in SUFFIXES for path in part.iterdir() if not _is_hidden(path.name))
    if not listed:
        if loose:
            raise UserError(f"{shown(part)} holds images but none in class folders; expected {shown(part)}/CLASS/FILE")
        raise UserError(
            f"{shown(part)} holds no images; expected {shown(part)}/CLASS/FILE with one of {' '.join(sorted(SUFFIXES))}"
        )
    if ignored:
        what = ", ".join(
            f"{_count(n, 'file')} {f'with {s}' if s else 'without extension'}" for s, n in sorted(ignored.items())
        )
        notes.append(f"{what} in {part.name}/ {'is' if ignored.total() == 1 else 'are'} not read")
    if loose:
        notes.append(
            f"{_count(loose, 'image')} directly in {part.name}/ {'belongs' if loose == 1 else 'belong'} to no class"
        )
    if nested:
        notes.append(f"images in folders within a class count as that class: {_some(nested)}")
    if empty := [names[label] for label in sorted(set(range(len(names))) - {label for _, label in listed})]:
        notes.append(f"{part.name}/ has no images of the {'class' if len(empty) == 1 else 'classes'} {_some(empty)}")
    return listed


def _images(folder: Path, ignored: Counter[str], nested: list[str], above: list[tuple[int, int]]) -> Iterator[Path]:
    """The image files in ``folder`` and in the folders within it, by name."""
    status = folder.stat()
    here = [*above, (status.st_dev, status.st_ino)]
    if here[-1] in above:
        raise UserError(f"{shown(folder)} is a link to a folder that it lies in; remove it")
    with os.scandir(folder) as entries:
        inside = sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    found = False
    for entry in inside:
        path = Path(entry.path)
        if _is_folder(entry):
            yield from _images(path, ignored, nested, here)
        elif path.suffix.lower() in SUFFIXES:
            if not path.is_file():  # to read a pipe would wait for ever
                raise UserError(f"{shown(path)} is not a readable image (not a regular file); repair or remove it")
            found = True
            yield path
        else:
            ignored[shown(path.suffix.lower())] += 1
    if found and above and folder.name != "images":  # as in Tiny ImageNet
        nested.append("/".join(folder.parts[-len(here) :]))


def _test_folder(root: Path, names: list[str], notes: list[str]) -> str:
    """The folder that the test images are in."""
    there = [name for name in TESTS if (root / name).is_dir()]
    if not there:
        raise _missing(root, "test")
    good = [name for name in there if (root / name / ANNOTATIONS).is_file() or {*_folders(root / name, [])} & {*names}]
    chosen = (good or there)[0]
    if chosen != "test":
        why = "test/ has no class folders" if "test" in there else "there is no test/"
        notes.append(f"{why}: {chosen}/ is read as the test set")
    for name in there:
        if name not in ("test", chosen):
            notes.append(f"{name}/ is not read; --val-fraction holds out training images")
    return chosen


def _check_known(part: Path, found: list[str], names: list[str]) -> None:
    if others := sorted({*found} - {*names}):
        near = difflib.get_close_matches(others[0], names, 1)
        hint = f"; did you mean {shown(near[0])}?" if near else ""
        raise UserError(
            f"{shown(part / others[0])} is a class that train/ does not have; both need the same class folders{hint}"
        )


def _annotated(part: Path, names: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    path, labels, listed = part / ANNOTATIONS, {name: label for label, name in enumerate(names)}, {}
    for number, line in enumerate(files.read_text(path, "surrogateescape").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = labels.get(rest.partition("\t")[0])
        if label is None or name in listed or Path(name).name != name or not (part / "images" / name).is_file():
            raise UserError(
                f"{shown(path)}, line {number}: '{shown(line)[:80]}'; expected a file in {part.name}/images/, once, a tab "
                "and a class folder of train/"
            )
        listed[name] = label
    ignored, nested = Counter[str](), list[str]()
    found = {image.name for image in _images(part / "images", ignored, nested, [])}
    if left := len(found - listed.keys()):
        notes.append(
            f"{_count(left, 'image')} in {part.name}/images/ {'is' if left == 1 else 'are'} not in {ANNOTATIONS}, and not read"
        )
    if not listed:
        raise UserError(f"{shown(path)} names no images")
    return [(part / "images" / name, label) for name, label in sorted(listed.items(), key=lambda item: item[::-1])]


def _missing(root: Path, part: str) -> UserError:
    inside = [p for p in sorted(root.iterdir()) if not _is_hidden(p.name) and p.is_dir()] if root.is_dir() else []
    if within := [p for p in inside if (p / "train").is_dir()]:
        found = f", but {shown(within[0].name)}/train/: is --data-dir {shown(within[0])} meant?"
    else:
        found = f", only {_some([p.name + '/' for p in inside])};" if inside else ";"
    return UserError(
        f"--data-dir {shown(root)}: no folder {part}/ in it{found} --dataset folder reads train/CLASS/FILE and test/CLASS/FILE"
    )


def _one_class(part: Path, names: list[str]) -> UserError:
    (full,) = [name for name in names if next(_images(part / name, Counter(), [], []), None)]
    inside = _folders(part / full, [])
    hint = f"; if {_some(inside)} are the classes, they belong into {shown(part)}" if len(inside) > 1 else ""
    return UserError(f"{shown(part)} has images of one class, {shown(full)}; a classifier needs at least two{hint}")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
