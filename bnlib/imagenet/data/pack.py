"""A smaller copy of a data set, in few files that are fast to read.

    python -m bnlib pack SOURCE DESTINATION --shorter-side 256 --quality 90

``DESTINATION/<split>/`` is a data set in the Hugging Face format, as ``save_to_disk`` writes it:
Arrow files of a thousand images each, with the columns ``image``, ``label`` and ``file_name``.
Beside them are ``pack.json``, with the settings and every file's sha256, and ``damaged.tsv``, with
the images that cannot be decoded and are left out.

An Arrow file is complete when ``pack.json`` lists it, and the data set when it has a
``dataset_info.json``. Started again after an interruption, packing continues with the files that
are not listed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from bnlib.imagenet.data import hub
from bnlib.imagenet.data.decode import DamagedImage, Encoded
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SPLITS, Source, SourceError
from bnlib.imagenet.data.workers import Workers
from bnlib.runs import write_atomically

__all__ = ["main", "pack", "repacked"]

IMAGES_PER_FILE = 1000
MAX_UNREADABLE = 10  # files of a thousand that cannot be opened; more, and the disk is gone


def repacked(data: bytes, name: str, shorter_side: int, quality: int) -> bytes:
    """An image as the packed copy stores it: a small ordinary JPEG as it is, others as JPEG."""
    from PIL import Image

    encoded = Encoded(data, name)
    small = min(encoded.width, encoded.height) <= shorter_side
    pixels = encoded.decode() if small else encoded.resize_shorter(shorter_side)
    if small and encoded.is_ordinary_jpeg:
        return data
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    output = io.BytesIO()
    # 4:2:0, as nearly all JPEGs have it: half the color resolution in both directions
    image.save(output, "JPEG", quality=quality, subsampling=2)
    return output.getvalue()


def pack(
    location: str | Path,
    destination: str | Path,
    *,
    shorter_side: int = 256,
    quality: int = 90,
    splits: Sequence[str] = tuple(SPLITS),
    workers: int | None = None,
    verify: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write a smaller copy of a data set, or what is missing of one; the notes about its files.

    Images with more than ``shorter_side`` pixels on their shorter side are made smaller.
    ``quality`` counts as libjpeg does. There are as many workers as processor cores by default.
    ``verify`` reads everything again and compares it with its checksums.

    Raises
    ------
    ValueError
        If a number is out of range, the destination is inside the images of the source, or it was
        begun with other settings or another source.
    SourceError
        If the source cannot be read, or no longer can be, or verifying finds something else than
        was written.
    OSError
        If the destination cannot be written, as when its disk is full.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if shorter_side < 1 or not 1 <= quality <= 100 or workers < 1:
        raise ValueError(
            f"shorter_side is {shorter_side}, quality {quality} and workers {workers}; they must "
            "be at least 1, from 1 to 100, and at least 1"
        )
    opened = {split: open_source(location, split) for split in splits}
    root, target = (Path(each).expanduser().resolve() for each in (location, destination))
    if target == root or any(target.is_relative_to(root / split) for split in SPLITS):
        raise ValueError(
            f"{destination} lies in the images of {location}; choose another destination"
        )
    settings = {"shorter_side": shorter_side, "quality": quality}
    packed = {}
    for split, source in opened.items():
        folder = Path(destination).expanduser() / split
        packed[split] = _pack_split(_Files(source, folder, settings), workers)
        if verify:
            _verify(folder, packed[split])
    return packed


class _Files(Dataset[dict[str, Any]]):
    """From the number of an Arrow file to the note about it, once it is written."""

    def __init__(self, source: Source, folder: Path, settings: dict[str, int]) -> None:
        self.source, self.folder, self.settings = source, folder, settings
        self.features = hub.image_features(source.classes)
        indices = range(len(source))
        parts = [indices[first : first + IMAGES_PER_FILE] for first in indices[::IMAGES_PER_FILE]]
        self.images = {
            f"data-{number:05}-of-{len(parts):05}.arrow": part for number, part in enumerate(parts)
        }
        self.names = list(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        damaged: dict[str, str] = {}
        unreadable = 0
        for index in self.images[self.names[number]]:
            name = self.source.name(index).encode(errors="backslashreplace").decode()
            try:
                data, label, _ = self.source[index]
                data = repacked(data, name, **self.settings)
            except (DamagedImage, OSError) as error:
                unreadable += isinstance(error, OSError)
                if unreadable > MAX_UNREADABLE:
                    raise SourceError(
                        f"{unreadable} images of {self.source.location} cannot be read: {error}; "
                        "is it still there? Start again to continue"
                    ) from error
                damaged[name] = getattr(error, "reason", str(error))
                continue
            rows.append({"image": {"bytes": data, "path": None}, "label": label, "file_name": name})
        content = hub.arrow_stream(rows, self.features)
        write_atomically(self.folder / self.names[number], content)
        checksum = hashlib.sha256(content).hexdigest()
        return {"sha256": checksum, "images": len(rows), "damaged": damaged}


def _pack_split(files: _Files, workers: int) -> dict[str, Any]:
    """Write what is missing of a split; the notes about all its files."""
    folder, total = files.folder, len(files.source)
    plan = {**files.settings, "images_per_file": IMAGES_PER_FILE}
    state = _begun(folder, {**plan, "source": files.source.fingerprint()})
    notes: dict[str, Any] = state["files"]
    if (folder / "dataset_info.json").exists():
        return notes
    for left_over in folder.glob(".*.tmp"):
        left_over.unlink()
    missing = range(len(notes), len(files.names))  # they are noted in their order
    processes = min(workers, len(missing)) if workers > 1 else 0
    written = Workers(files, missing, processes, torch.device("cpu"))
    done = min(len(notes) * IMAGES_PER_FILE, total)
    with tqdm(
        total=total, initial=done, desc=f"packing {folder.name}", unit="img", disable=None
    ) as bar:
        for name in files.names[len(notes) :]:
            notes[name] = next(written)
            _write(folder, state)
            bar.update(len(files.images[name]))
    if not any(note["images"] for note in notes.values()):
        raise SourceError(f"none of the {total} images for {folder} can be decoded")
    damaged = [row for note in notes.values() for row in note["damaged"].items()]
    table = "".join(f"{name}\t{reason}\n" for name, reason in [("name", "reason"), *damaged])
    write_atomically(folder / "damaged.tsv", table.encode())
    hub.make_data_set(folder, files.names, files.features)
    return notes


def _begun(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What has been packed with the same settings; others are refused."""
    path = folder / "pack.json"
    if not path.exists():
        if any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} holds something else; choose another destination")
        state = {"settings": settings, "files": {}}
        _write(folder, state)
        return state
    state = json.loads(path.read_text())
    begun = state["settings"]
    if differing := [key for key in settings if begun.get(key) != settings[key]]:
        raise ValueError(
            f"{folder} was begun with other settings: "
            + ", ".join(f"{key} {begun.get(key)} there, {settings[key]} now" for key in differing)
            + "; choose another destination or delete it"
        )
    return state


def _write(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / "pack.json", (json.dumps(state, indent=1) + "\n").encode())


def _verify(folder: Path, notes: dict[str, Any]) -> None:
    """Read everything and compare it with the checksums."""
    for name, note in notes.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != note["sha256"]:
            raise SourceError(
                f"{folder / name} is not what was packed: its sha256 is {found}, not "
                f"{note['sha256']}; delete {folder} and pack again"
            )


def main(argv: Sequence[str]) -> int:
    """The command ``python -m bnlib pack``; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnlib pack",
        description="Write a smaller copy of a data set, fast to read. "
        "Started again after an interruption, it continues.",
    )
    parser.add_argument("source", help="folder, archives' folder or hf:NAME")
    parser.add_argument("destination", help="folder, made if need be")
    parser.add_argument("--shorter-side", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default 90)")
    parser.add_argument("--splits", nargs="+", choices=tuple(SPLITS), default=tuple(SPLITS))
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read everything again and compare it with its checksums",
    )
    options = vars(parser.parse_args(argv))
    source, destination = options.pop("source"), options.pop("destination")
    try:
        packed = pack(source, destination, **options)
    except (OSError, KeyboardInterrupt) as error:
        print(f"pack: {str(error) or 'interrupted'}; start it again to continue", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    for split, notes in packed.items():
        images = sum(note["images"] for note in notes.values())
        damaged = sum(len(note["damaged"]) for note in notes.values())
        note = f", {damaged} damaged ones left out (damaged.tsv)" if damaged else ""
        print(f"{Path(destination).expanduser() / split}: {images} images{note}")
    return 0
