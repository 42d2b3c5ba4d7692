"""Predicts classes and uncertainties with an exported network. Needs numpy and onnxruntime, and Pillow to read image files.

This file can be copied and used without the library that wrote it: ``Predictor("FOLDER")(images)``. A network is a program that
takes as much memory and time as it says; open one that you trust.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

OUTPUTS = (["probs", "total"], ["probs", "total", "aleatoric", "epistemic"])
"""What a network can compute: without draws, and with several."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""Formats that Pillow decodes itself. For others it may start programs."""
PIXELS = 2**24, 2**26
"""Largest number of pixels of an image that is read at its own size, and of one that is resized."""


class Predictor:
    """An exported network: uint8 images [n, c, h, w] in; class probabilities [n, classes] and entropies [n] in nats out."""

    def __init__(self, folder: str | Path, threads: int = 0):
        """Open ``FOLDER/model.onnx``; ``threads`` is the number of threads, 0 for all cores.

        Raises ``FileNotFoundError`` if there is none, and ``ValueError`` for a file that is not an export or is damaged.
        """
        import onnxruntime

        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no model.onnx; export one with --format onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised, and said once
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            facts = json.loads(session.get_modelmeta().custom_metadata_map["pyro_lottery"])
        except Exception as error:  # onnxruntime has several dozen of its own
            raise ValueError(f"{path} is not an export of pyro_lottery ({_line(error)})") from error
        self.facts: dict[str, Any] = checked(facts, path)
        self._run: Any = lambda images: session.run(self.facts["outputs"], {"images": images})

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.facts["classes"]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name: ``probs`` [n, classes], ``total`` [n] and, for several draws, ``aleatoric`` and ``epistemic`` [n].

        Raises ``ValueError`` unless ``images`` are uint8 of the network's shape, and the outputs of theirs.
        """
        shape = tuple(self.facts["image_shape"])
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (n, {', '.join(map(str, shape))})"
            )
        outputs: dict[str, np.ndarray] = dict(zip(self.facts["outputs"], self._run(images), strict=True))
        for name, value in outputs.items():
            expected = (len(images), *([len(self.classes)] if name == "probs" else []))
            if value.shape != expected:
                raise ValueError(f"the network's {name} is {value.shape}; expected {expected}")
        return outputs

    def predict_proba(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities [n, classes], as scikit-learn calls them."""
        return self(images)["probs"]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Names of the most probable classes [n]."""
        return np.asarray(self.classes)[self.predict_proba(images).argmax(1)]

    def read(self, paths: Sequence[str | Path]) -> np.ndarray:
        """Image files as uint8 [n, c, h, w]: upright, resized and cropped if the run's images were.

        Raises ``ValueError`` for a file that is not an image, and for an image of another size or kind than the network's.
        """
        return np.stack([self._pixels(path) for path in paths])

    def _pixels(self, path: str | Path) -> np.ndarray:
        from PIL import Image

        channels, height, width = self.facts["image_shape"]
        try:
            image, kind = _decoded(path, PIXELS[bool(self.facts["resize"])])
        except Exception as error:  # decoders raise many types
            raise ValueError(f"{path} is not an image that can be read ({_line(error)})") from error
        if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # 65,535 is white
            image = Image.fromarray(((np.array(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"{path} holds real numbers; save it with 8 bits a channel")
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        if channels == 1 and image.mode != "L":
            raise ValueError(f"{path} is in colour; the network was trained on grey images")
        image = _crop(image, width) if self.facts["resize"] else image
        if image.size != (width, height):
            raise ValueError(
                f"{path} is {image.width}×{image.height}; the network was trained on {width}×{height} images"
            )
        return np.atleast_3d(np.asarray(image.convert("L" if channels == 1 else "RGB"))).transpose(2, 0, 1)


def checked(facts: Any, path: Path) -> dict[str, Any]:
    """``facts``, which the file ``path`` says about itself; raises ``ValueError`` unless they describe an export."""
    try:
        shape, classes = facts["image_shape"], facts["classes"]
        problem = (
            "image_shape is not three sizes" if len(shape) != 3 or not all(type(n) is int and 0 < n < 2**15 for n in shape)
            else "classes are not names" if not (isinstance(classes, list) and classes and all(map(str.isprintable, classes)))
            else "outputs are unknown" if facts["outputs"] not in OUTPUTS
            else "resize is neither true nor false" if type(facts["resize"]) is not bool
            else None
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        problem = _line(error)
    if problem:
        raise ValueError(f"{path} is not an export of pyro_lottery ({problem})")
    return facts


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _decoded(path: str | Path, most: int) -> tuple[Any, str | None]:
    """An image file, upright, and its format."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
        if file.width * file.height > most:
            raise ValueError(f"it has {file.width}×{file.height} pixels, more than {most:,}")
        file.load()
        return ImageOps.exif_transpose(file), file.format


def _crop(image: Any, size: int) -> Any:
    """Resize the shorter side to ``size`` and cut out the centre."""
    short = min(image.size)
    image = _centre(image, *(min(side, 16 * short) for side in image.size))
    sides = [size if side == short else int(size * side / short) for side in image.size]
    return _centre(image.resize(sides, 2), size, size)  # 2: bilinear


def _centre(image: Any, width: int, height: int) -> Any:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
