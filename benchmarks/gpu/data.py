"""Photographs to mini-batches on the device's own machine: does the network have to wait?"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlib.imagenet.data.batch_decode import is_chosen
from bnlib.imagenet.data.decode import decoder
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.pack import pack
from bnlib.imagenet.recipes import recipe

WORKERS = os.cpu_count() or 1

Use = Callable[[Tensor, Tensor], object]


def measure(
    network: nn.Module, device: torch.device, batch: int, size: int, seconds: float,
    photographs: int,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Images a second of each way that works here: that arrive, and that are trained on."""
    import data_path

    logging.getLogger("bnlib").setLevel(logging.ERROR)
    rates: dict[str, tuple[float, float]] = {}
    train = training(network, device)
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = Path(scratch) / "photographs", Path(scratch) / "packed"
        data_path.make_photographs(folder, photographs)
        pack(folder, packed, splits=("train",), workers=min(WORKERS, 8), progress=False)
        plain = recipe("bn-x5").replace(
            batch_size=batch, image_size=size, photometric=0.0, num_classes=4
        )
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "ImageFolder, PIL": lambda: theirs(folder, size, batch)
        }
        for name, where in (("folder", folder), ("packed", packed)):
            for decode in ("cpu", "gpu"):
                way = f"{name}, decoded by {decoder() if decode == 'cpu' else 'nvJPEG'}"
                ways[way] = partial(ours, where, plain, device, decode)
        for way, begin in ways.items():
            try:
                rates[way] = rate(begin, batch, seconds, device, train)
            except Exception as error:  # of many kinds; the other lines do without
                print(f"  {way}: left out: {' '.join(str(error).split())[:300]}")
            gc.collect()  # ends the workers, which would decode on
        files = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))]
        try:
            alone = decoding(files, batch, device)
            rates["nvJPEG through torchvision, decoding alone"] = alone, float("nan")
        except Exception as error:
            print(f"  nvJPEG through torchvision: left out: {' '.join(str(error).split())[:200]}")
    return rates


def theirs(folder: Path, size: int, batch: int) -> Iterator[Any]:
    import data_path

    return data_path.torchvision_batches(folder, size, batch, WORKERS)


def ours(where: Path, plain: Any, device: torch.device, decode: str) -> Iterator[Any]:
    is_chosen(decode, device)
    source = open_source(where, "train")
    return batches(source, plain, workers=WORKERS, device=device, decode=decode)


def training(network: nn.Module, device: torch.device) -> Use:
    """A step as the trainer makes it by default: nothing captured, compiled or fused."""
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def rate(
    begin: Callable[[], Iterator[Any]], batch: int, seconds: float, device: torch.device, train: Use
) -> tuple[float, float]:
    """Images a second that arrive on the device; and with a training step on each mini-batch."""
    stream = begin()

    def arrive() -> tuple[Tensor, Tensor]:
        images, labels = (part for part in next(stream) if isinstance(part, Tensor))
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    # at the start the workers come up, then all have mini-batches ready: neither is the rate
    for _ in range(2 * WORKERS + 3):
        arrive()
    arriving = timed(arrive, batch, seconds, device)
    for _ in range(3):
        train(*arrive())
    for _ in range(WORKERS):  # the steps above gave the workers time to get ahead
        arrive()
    return arriving, timed(lambda: train(*arrive()), batch, seconds, device)


def timed(act: Callable[[], object], batch: int, seconds: float, device: torch.device) -> float:
    """Images a second."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 2:
        act()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * batch / (time.perf_counter() - start)


def decoding(files: list[bytes], batch: int, device: torch.device) -> float:
    """Whole photographs a second that torchvision decodes on a GPU."""
    if device.type != "cuda":
        raise RuntimeError("it needs a GPU")
    from torchvision.io import decode_jpeg

    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files[:batch]]
    decode_jpeg(encoded, device=str(device))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        decode_jpeg(encoded, device=str(device))
    torch.cuda.synchronize()
    return 20 * len(encoded) / (time.perf_counter() - start)


def show(rates: dict[str, tuple[float, float]], network: float | None) -> None:
    """One line a way, against what the network takes."""
    for way, (arriving, trained) in rates.items():
        line = f"  {way}: {arriving:.0f} img/s with {WORKERS} workers"
        if trained == trained:
            line += f", {trained:.0f} in an eager training step each"
        if network:
            ratio = arriving / network
            line += (
                f"; outruns the network at its fastest by {ratio:.2f}"
                if ratio >= 1
                else f"; falls short of the network at its fastest by {1 / ratio:.2f}"
            )
        print(line)
