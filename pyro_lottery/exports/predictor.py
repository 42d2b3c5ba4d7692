"""Predicts classes and uncertainties with an exported network. Needs numpy and onnxruntime, and Pillow to read image files.

This file can be copied and used without the library that wrote it: ``Predictor("FOLDER")(images)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Predictor:
    """An exported network: uint8 images [n, c, h, w] in; class probabilities [n, classes] and entropies [n] in nats out."""

    def __init__(self, folder: str | Path, threads: int = 0):
        """Open ``FOLDER/model.onnx``; ``threads`` is the number of threads, 0 for all cores."""
        import onnxruntime

        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no model.onnx; export one with --format onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.facts: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map["pyro_lottery"])
        self._run: Any = lambda images: session.run(self.facts["outputs"], {"images": images})

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.facts["classes"]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name: ``probs`` [n, classes], ``total`` [n] and, for several draws, ``aleatoric`` and ``epistemic`` [n].

        Raises ``ValueError`` unless ``images`` are uint8 of the network's shape.
        """
        shape = tuple(self.facts["image_shape"])
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (n, {', '.join(map(str, shape))})"
            )
        return dict(zip(self.facts["outputs"], self._run(images), strict=True))

    def predict_proba(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities [n, classes], as scikit-learn calls them."""
        return self(images)["probs"]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Names of the most probable classes [n]."""
        return np.asarray(self.classes)[self.predict_proba(images).argmax(1)]

    def read(self, paths: Sequence[str | Path]) -> np.ndarray:
        """Image files as uint8 [n, c, h, w]: upright, resized and cropped if the run's images were.

        Raises ``ValueError`` for an image of another size than the network's, or of another kind.
        """
        return np.stack([self._pixels(path) for path in paths])

    def _pixels(self, path: str | Path) -> np.ndarray:
        from PIL import Image, ImageOps

        channels, height, width = self.facts["image_shape"]
        with Image.open(path) as file:
            image: Any = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16") or (image.mode == "I" and file.format in ("PNG", "PPM")):  # 65,535 is white
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


def _crop(image: Any, size: int) -> Any:
    """Resize the shorter side to ``size`` and cut out the centre."""
    short = min(image.size)
    image = _centre(image, *(min(side, 16 * short) for side in image.size))
    sides = [size if side == short else int(size * side / short) for side in image.size]
    return _centre(image.resize(sides, 2), size, size)  # 2: bilinear


def _centre(image: Any, width: int, height: int) -> Any:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
