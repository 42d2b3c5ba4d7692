"""Finding the classes and image files in a folder, without decoding the images."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyro_lottery import untrusted
from pyro_lottery.errors import UserError

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
}  # fmt: skip
TESTS = ("test", "val", "valid", "validation")
"""Possible names of the test folder; the first one that has class folders is read."""
ANNOTATIONS = "val_annotations.txt"
"""Label file of Tiny ImageNet: each line has a file's name and its class, separated by a tab; the files are in ``images/``."""
_JUNK = {
    "@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found", "__pycache__",
}  # fmt: skip
_HIDDEN = re.compile(r"\.(_.*|ipynb_checkpoints|ds_store|git|svn|cache|thumbnails|trash.*|spotlight.*|fseventsd)", re.I)
"""Hidden folders of tools and systems, which are skipped without a note."""


@dataclass(frozen=True)
class Tree:
    """The image files of a data set."""

    classes: tuple[str, ...]
    """Names of the class folders in the order of their labels."""
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    """Image files and their labels, ordered by label and name."""
    notes: list[str]
    """Notes for the user on files that are not read, or not as one might expect."""

    @property
    def files(self) -> list[tuple[Path, int]]:
        """Image files and labels of both parts."""
        return [*self.train, *self.test]


def read(root: Path) -> Tree:
    """List the class folders of ``root/train`` and the image files of ``root/train`` and ``root/test``.

    Raises ``UserError`` if a folder or its images are missing, if there is only one class, or if the classes differ.
    """
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
    r"""Return a file's name as printable text; bytes that are not UTF-8 and control characters become escapes.

    >>> shown("caf\udce9"), shown("a\nb")
    ('caf\\xe9', 'a\\nb')
    """
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Path.is_dir() is False for circular links.
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _folders(part: Path, notes: list[str]) -> list[str]:
    """Return the names of the class folders in ``part``, sorted."""
    with os.scandir(part) as entries:
        every = sorted(entry.name for entry in entries if _is_folder(entry))
    odd = [name for name in every if name.startswith(".") and not _HIDDEN.fullmatch(name)]
    if odd:
        notes.append(f"hidden folders in {part.name}/ are not read as classes: {', '.join(map(shown, odd))}")
    return [name for name in every if not _is_hidden(name)]


def _listed(part: Path, names: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    """Return the images of all classes in ``part``; add notes on other files and on images in unexpected places."""
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
            raise UserError(f"{shown(part)} has images, but not in class folders; expected {shown(part)}/CLASS/FILE")
        raise UserError(
            f"{shown(part)} has no images; expected {shown(part)}/CLASS/FILE with one of {' '.join(sorted(SUFFIXES))}"
        )
    if ignored:
        what = ", ".join(
            f"{_count(n, 'file')} {f'with {s}' if s else 'without suffix'}" for s, n in sorted(ignored.items())
        )
        notes.append(f"{what} in {part.name}/ {'is' if ignored.total() == 1 else 'are'} not read")
    if loose:
        notes.append(
            f"{_count(loose, 'image')} directly in {part.name}/ {'has' if loose == 1 else 'have'} no class and {'is' if loose == 1 else 'are'} not read"
        )
    if nested:
        notes.append(f"images in subfolders of a class folder belong to that class: {_some(nested)}")
    if empty := [names[label] for label in sorted(set(range(len(names))) - {label for _, label in listed})]:
        notes.append(f"{part.name}/ has no images of the {'class' if len(empty) == 1 else 'classes'} {_some(empty)}")
    return listed


def _images(folder: Path, ignored: Counter[str], nested: list[str], above: list[tuple[int, int]]) -> Iterator[Path]:
    """Yield the image files in ``folder`` and its subfolders, ordered by name."""
    status = folder.stat()
    here = [*above, (status.st_dev, status.st_ino)]
    if here[-1] in above:
        raise UserError(f"{shown(folder)} is a link to a folder that contains it; remove the link")
    with os.scandir(folder) as entries:
        inside = sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    found = False
    for entry in inside:
        path = Path(entry.path)
        if _is_folder(entry):
            yield from _images(path, ignored, nested, here)
        elif path.suffix.lower() in SUFFIXES:
            if not path.is_file():  # reading a pipe might never end
                raise UserError(f"{shown(path)} is not a readable image (not a regular file); repair or remove it")
            found = True
            yield path
        else:
            ignored[shown(path.suffix.lower())] += 1
    if found and above and folder.name != "images":  # Tiny ImageNet has CLASS/images/
        nested.append("/".join(folder.parts[-len(here) :]))


def _test_folder(root: Path, names: list[str], notes: list[str]) -> str:
    """Return the name of the folder with the test images."""
    there = [name for name in TESTS if (root / name).is_dir()]
    if not there:
        raise _missing(root, "test")
    good = [name for name in there if (root / name / ANNOTATIONS).is_file() or {*_folders(root / name, [])} & {*names}]
    chosen = (good or there)[0]
    if chosen != "test":
        why = "test/ has no class folders" if "test" in there else "there is no test/"
        notes.append(f"{why}, so {chosen}/ is read as the test set")
    for name in there:
        if name not in ("test", chosen):
            notes.append(f"{name}/ is not read; use --val-fraction to hold out training images")
    return chosen


def _check_known(part: Path, found: list[str], names: list[str]) -> None:
    if others := sorted({*found} - {*names}):
        near = difflib.get_close_matches(others[0], names, 1)
        hint = f"; did you mean {shown(near[0])}?" if near else ""
        raise UserError(
            f"{shown(part / others[0])} is not a class folder of train/; both need the same class folders{hint}"
        )


def _annotated(part: Path, names: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    path, labels, listed = part / ANNOTATIONS, {name: label for label, name in enumerate(names)}, {}
    for number, line in enumerate(untrusted.read_text(path, "surrogateescape").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = labels.get(rest.partition("\t")[0])
        if label is None or name in listed or Path(name).name != name or not (part / "images" / name).is_file():
            raise UserError(
                f"{shown(path)}, line {number} is '{shown(line)[:80]}'; expected a file in {part.name}/images/ (once only), "
                "a tab and a class folder of train/"
            )
        listed[name] = label
    ignored, nested = Counter[str](), list[str]()
    found = {image.name for image in _images(part / "images", ignored, nested, [])}
    if left := len(found - listed.keys()):
        notes.append(
            f"{_count(left, 'image')} in {part.name}/images/ {'is' if left == 1 else 'are'} not read, since "
            f"{ANNOTATIONS} does not list {'it' if left == 1 else 'them'}"
        )
    if not listed:
        raise UserError(f"{shown(path)} lists no images; expected a line with a file, a tab and a class for each image")
    return [(part / "images" / name, label) for name, label in sorted(listed.items(), key=lambda item: item[::-1])]


def _missing(root: Path, part: str) -> UserError:
    inside = [p for p in sorted(root.iterdir()) if not _is_hidden(p.name) and p.is_dir()] if root.is_dir() else []
    if within := [p for p in inside if (p / "train").is_dir()]:
        found = f", but {shown(within[0].name)}/train/; did you mean --data-dir {shown(within[0])}?"
    else:
        found = f", only {_some([p.name + '/' for p in inside])};" if inside else ";"
    return UserError(
        f"--data-dir {shown(root)} has no folder {part}/{found} --dataset folder reads train/CLASS/FILE and test/CLASS/FILE"
    )


def _one_class(part: Path, names: list[str]) -> UserError:
    (full,) = [name for name in names if next(_images(part / name, Counter(), [], []), None)]
    inside = _folders(part / full, [])
    hint = f"; if {_some(inside)} are the classes, move them to {shown(part)}" if len(inside) > 1 else ""
    return UserError(f"{shown(part)} has images of one class, {shown(full)}; a classifier needs at least two{hint}")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
