"""MNIST, from wherever it can be had: IDX files in a folder, a download, or digits drawn here in the same shapes."""

from __future__ import annotations

import gzip
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision_anyway import torchvision


def _torchvision_mnist():
    """`torchvision.datasets.mnist`; ImportError without torchvision."""
    torchvision()
    from torchvision.datasets import mnist

    return mnist


def load(folder: Path | None, say=print) -> tuple[Tensor, Tensor]:
    """Images `[N, 1, 28, 28]` float32, normalised, and labels `[N]` int64; says in one line where they come from."""
    for source in (_from_files, _from_network):
        try:
            images, labels, where = source(folder)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = error
            if folder is not None and source is _from_files:
                say(f"MNIST: {error}; trying a download")
            continue
        say(f"MNIST: {len(images)} images {where}")
        return _normalised(images), labels.long()
    images, labels = drawn_digits()
    say(f"MNIST cannot be had here ({type(reason).__name__}): training on {len(images)} digits drawn by this program instead")
    return _normalised(images), labels


def _from_files(folder: Path | None) -> tuple[Tensor, Tensor, str]:
    """The training pair of IDX files, or else the t10k pair, packed or not, in the folder or where torchvision puts them."""
    if folder is None:
        raise FileNotFoundError("no folder given")
    for part in ("train", "t10k"):
        for place in (folder, folder / "MNIST" / "raw"):
            pair = [_existing(place / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
            if all(pair):
                return _read(pair[0], "read_image_file"), _read(pair[1], "read_label_file"), f"from {place}"
    raise FileNotFoundError(f"no IDX files in {folder}")


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.exists()), None)


def _read(path: Path, reader: str) -> Tensor:
    read = getattr(_torchvision_mnist(), reader)
    if path.suffix != ".gz":
        return read(str(path))
    with tempfile.NamedTemporaryFile() as unpacked, gzip.open(path) as packed:
        shutil.copyfileobj(packed, unpacked)
        unpacked.flush()
        return read(unpacked.name)


def _from_network(folder: Path | None) -> tuple[Tensor, Tensor, str]:
    """Downloaded by torchvision, into the folder if it is there, else for this run only."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            dataset = _torchvision_mnist().MNIST(folder if folder and folder.is_dir() else scratch, train=True, download=True)
            return dataset.data, dataset.targets, "downloaded"
    finally:
        socket.setdefaulttimeout(before)


def drawn_digits(count: int = 10_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits of a font, shifted, turned, sized and noisy: uint8 `[count, 28, 28]` and int64 `[count]`."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    glyphs = [[_glyph(digit, size) for size in range(20, 24)] for digit in range(10)]
    images = np.zeros((count, 28, 28), dtype=np.uint8)
    for i, digit in enumerate(labels):
        glyph = glyphs[digit][random.integers(4)].rotate(random.uniform(-8, 8), translate=tuple(random.integers(-1, 2, 2)))
        noisy = np.asarray(glyph, dtype=np.float32) * random.uniform(0.8, 1.0) + random.normal(0, 5, (28, 28))
        images[i] = noisy.clip(0, 255)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _glyph(digit: int, size: int) -> Image.Image:
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).text((14, 14), str(digit), fill=255, stroke_width=1, anchor="mm", font=ImageFont.load_default(size))
    return image


def _normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - 0.1307) / 0.3081).unsqueeze(1)
