"""Photographs to mini-batches on the device's own machine: does the network have to wait?"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bnlib.imagenet.batch_decode import is_chosen
from bnlib.imagenet.decode import decoder
from bnlib.imagenet.loader import batches
from bnlib.imagenet.pack import pack
from bnlib.imagenet.recipes import recipe
from bnlib.imagenet.sources import open_source

WORKERS = os.cpu_count() or 1


def measure(device: torch.device, batch: int, size: int, seconds: float, photographs: int) -> Any:
    """Images a second of each way that works here: (ways, rates)."""
    import data_path

    logging.getLogger("bnlib").setLevel(logging.ERROR)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = Path(scratch) / "photographs", Path(scratch) / "packed"
        data_path.make_photographs(folder, photographs)
        pack(folder, packed, splits=("train",), workers=min(WORKERS, 8), progress=False)
        plain = recipe("bn-x5").replace(
            batch_size=batch, image_size=size, photometric=0.0, num_classes=4
        )
        try:
            theirs = data_path.torchvision_batches(folder, size, batch, WORKERS)
            rates["ImageFolder, PIL"] = rate(theirs, batch, seconds, device)
        except Exception as error:  # its workers may fail in many ways; the other lines do without
            print(f"  ImageFolder, PIL: left out: {error}")
        for name, where in (("folder", folder), ("packed", packed)):
            for decode in ("cpu", "gpu"):
                way = f"{name}, decoded by {decoder() if decode == 'cpu' else 'nvJPEG'}"
                try:
                    is_chosen(decode, device)
                    source = open_source(where, "train")
                    stream = batches(source, plain, workers=WORKERS, device=device, decode=decode)
                    rates[way] = rate(stream, batch, seconds, device)
                except Exception as error:
                    print(f"  {way}: left out: {' '.join(str(error).split())[:300]}")
        files = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))]
        try:
            rates["nvJPEG through torchvision, decoding alone"] = decoding(files, batch, device)
        except Exception as error:
            print(f"  nvJPEG through torchvision: left out: {' '.join(str(error).split())[:200]}")
    return rates


def rate(stream: Iterator[Any], batch: int, seconds: float, device: torch.device) -> float:
    """Images a second that arrive on the device, after the workers have come up."""
    for _ in range(3):
        next(stream)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 2:
        images = next(part for part in reversed(next(stream)) if getattr(part, "ndim", 0) == 4)
        images.to(device, non_blocking=True)
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
    for _ in range(5):
        decode_jpeg(encoded, device=str(device))
    torch.cuda.synchronize()
    return 5 * len(encoded) / (time.perf_counter() - start)


def show(rates: dict[str, float], network: float | None) -> None:
    """One line a way, against what the network takes."""
    for way, images_per_s in rates.items():
        line = f"  {way}: {images_per_s:.0f} img/s with {WORKERS} workers"
        if network:
            ratio = images_per_s / network
            line += (
                f"; outruns the network by {ratio:.2f}"
                if ratio >= 1
                else f"; falls short of the network by {1 / ratio:.2f}"
            )
        print(line)
