"""Images to normalized mini-batches, images a second on one core: ours against torchvision.

    python benchmarks/data_path.py [--data FOLDER] [--repeats 12] [--size 224] [--quick]

Three ways from files to float32 mini-batches of 32 are timed in turn, in one process, one thread:

* ``torchvision``: ImageFolder with PIL, v2's RandomResizedCrop, RandomHorizontalFlip, ToImage,
  ToDtype, Normalize, and a DataLoader;
* ``folder``: ``bnlib.imagenet.data.loader.batches`` on the same files;
* ``packed``: the same on an Arrow copy that ``bnlib.imagenet.data.pack`` made with its default
  settings.

Crops are drawn from the same distribution in all three; photometric distortions are off, as
torchvision has none here, and are then timed in ours. Without --data the images are made from
the two that scikit-learn bundles: random parts of them, enlarged to 500x375, with noise, about
110 KB each as ImageNet's are. Printed are medians of the ratios of neighboring repeats, of
processor time. ``decoding`` is what TorchCodec alone needs for the pixels of the same files;
``reading``, what their bytes and labels take, in microseconds an image.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from bnlib.imagenet.data.decode import Encoded, decoder
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.pack import pack
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.recipes import recipe

BATCH = 32
READS = 1000


def make_images(folder: Path, count: int) -> None:
    """JPEGs as large as ImageNet's, in ``folder/train/<class>``."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        original = originals[number % 2]
        share = rng.uniform(0.45, 0.85)
        width, height = int(original.width * share), int(original.width * share * 0.75)
        left = rng.integers(original.width - width + 1)
        top = rng.integers(max(1, original.height - height + 1))
        part = original.crop((left, top, left + width, min(top + height, original.height)))
        pixels = np.asarray(part.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
        noisy = (pixels + rng.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
        output = io.BytesIO()
        Image.fromarray(noisy).save(output, "JPEG", quality=93)
        path = folder / "train" / f"class{number % 4}" / f"{number:04}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(output.getvalue())


def torchvision_batches(
    folder: Path, size: int, batch: int = BATCH, workers: int = 0
) -> Iterator[Any]:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = ImageFolder(str(folder / "train"), transform)
    order = RandomSampler(data, num_samples=1 << 24)  # a long epoch: workers start anew in each
    loader = DataLoader(
        data, batch, sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available()
    )
    while True:
        yield from loader


def decode_all(images: list[bytes]) -> None:
    for data in images:
        Encoded(data).decode()


def read_all(source: Source, indices: list[int]) -> None:
    for index in indices:
        source[index]


def seconds(make: Callable[[], Any], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        make()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/<class>/*.JPEG to use instead")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="of the crops, pixels")
    parser.add_argument("--quick", action="store_true", help="a few repeats, to see that it runs")
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else arguments.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.data or Path(scratch) / "images"
        if arguments.data is None:
            make_images(folder, 64 if arguments.quick else 192)
        pack(folder, Path(scratch) / "packed", splits=("train",), workers=1)
        compare(folder, Path(scratch) / "packed", arguments.size, repeats)


def compare(folder: Path, packed: Path, size: int, repeats: int) -> None:
    sources = {"folder": open_source(folder, "train"), "packed": open_source(packed, "train")}
    plain = recipe("bn-x5").replace(
        batch_size=BATCH,
        image_size=size,
        photometric=0.0,
        num_classes=len(sources["folder"].classes),
    )
    distorted = plain.replace(photometric=1.0)
    theirs = torchvision_batches(folder, size)
    ways: dict[str, Callable[[], Any]] = {"torchvision": lambda: next(theirs)}
    rng = np.random.default_rng(0)
    for name, source in sources.items():
        reading_order = rng.integers(len(source), size=READS).tolist()
        few = [source[index].data for index in np.linspace(0, len(source) - 1, BATCH, dtype=int)]
        ways[name] = partial(next, batches(source, plain))
        ways[f"{name}, distorted"] = partial(next, batches(source, distorted))
        ways[f"{name}, decoding"] = partial(decode_all, few)
        ways[f"{name}, reading"] = partial(read_all, source, reading_order)
        kilobytes = sum(map(len, few)) / BATCH / 1000
        print(f"{name}: {len(source)} images of {kilobytes:.0f} KB on average")
    for make in ways.values():
        make()
    times = [{name: seconds(make, 2) for name, make in ways.items()} for _ in range(repeats)]
    print(
        f"torch {torch.__version__}, one thread, {decoder()}; crops of {size}, n = {repeats} "
        f"repeats of {2 * BATCH} images each"
    )
    for name in ways:
        if name.endswith("reading"):
            each = statistics.median(row[name] for row in times) / (2 * READS)
            print(f"{name:>20}: {1e6 * each:6.1f} microseconds an image")
            continue
        rate = 2 * BATCH / statistics.median(row[name] for row in times)
        ratio = statistics.median(row["torchvision"] / row[name] for row in times)
        print(f"{name:>20}: {rate:6.0f} img/s a core, {ratio:.2f} times torchvision")


if __name__ == "__main__":
    main()
