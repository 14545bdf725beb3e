"""A smaller copy of a data set, in few files that are fast to read.

    python -m bnlib pack SOURCE DESTINATION --shorter-side 256 --quality 90

Every image is made smaller, so that its shorter side has that many pixels, and stored as JPEG. An
image that is small enough already is stored as it is, if it is an ordinary JPEG.

``DESTINATION/<split>/`` holds record files of a thousand images each, one behind the other;
``index.npz``, which says where each image lies, with its name and label and the sha256 of every
record file; and ``damaged.tsv``, which names what could not be decoded and is left out.

A record file is written under a temporary name and renamed when complete, then what it holds is
noted beside it. Started again after an interruption, the work goes on behind the last such note.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnlib.imagenet.data.decode import DamagedImage, Encoded
from bnlib.imagenet.data.folders import SPLITS, PackedSource, open_source
from bnlib.imagenet.data.source import Source, SourceError
from bnlib.runs import write_atomically

__all__ = ["main", "pack", "repacked"]

RECORDS_PER_FILE = 1000
UNREADABLE = 10  # files of a record file's images that cannot be opened, as when a disk is gone


def repacked(data: bytes, name: str, shorter_side: int, quality: int) -> bytes:
    """An image as the packed form stores it.

    Parameters
    ----------
    data
        The encoded image.
    name
        For errors.
    shorter_side
        Pixels; an image whose shorter side has fewer keeps its size.
    quality
        JPEG quality as libjpeg counts, 1 to 100.

    Returns
    -------
    bytes
        A JPEG.

    Raises
    ------
    DamagedImage
        If the image cannot be decoded.
    """
    from PIL import Image

    encoded = Encoded(data, name)
    small = min(encoded.width, encoded.height) <= shorter_side
    pixels = encoded.decode() if small else encoded.resize_shorter(shorter_side)
    if small and encoded.is_ordinary_jpeg:
        return data
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    output = io.BytesIO()
    # 4:2:0, as nearly all JPEGs have it: half the color resolution in both directions
    picture.save(output, "JPEG", quality=quality, subsampling=2)
    return output.getvalue()


def pack(
    location: str | Path,
    destination: str | Path,
    *,
    shorter_side: int = 256,
    quality: int = 90,
    splits: Sequence[str] = SPLITS,
    workers: int | None = None,
    verify: bool = True,
    progress: bool = True,
) -> None:
    """Write a smaller copy of a data set; go on with one that was interrupted.

    Parameters
    ----------
    location
        What :func:`bnlib.imagenet.data.folders.open_source` opens.
    destination
        A folder, made if need be.
    shorter_side
        Pixels; an image whose shorter side has fewer keeps its size.
    quality
        JPEG quality as libjpeg counts, 1 to 100.
    splits
        Which parts: "train", "val" or both.
    workers
        Processes; one per processor core by default.
    verify
        Whether to read everything again afterwards and compare it with its checksums.
    progress
        Whether to draw a progress bar, in a terminal.

    Raises
    ------
    ValueError
        If a number is out of range, the destination is inside the images of the source, or it was
        begun with other settings or another source.
    SourceError
        If the source cannot be read, or no longer can be, or verifying finds something else than
        was written.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if shorter_side < 1 or not 1 <= quality <= 100 or workers < 1:
        raise ValueError(
            f"shorter_side is {shorter_side}, quality {quality} and workers {workers}; they must "
            "be at least 1, from 1 to 100, and at least 1"
        )
    opened = {split: open_source(location, split) for split in splits}
    folders = {split: Path(destination).expanduser() / split for split in splits}
    images = [Path(location).expanduser().resolve() / split for split in SPLITS]
    if any(folder.resolve().is_relative_to(each) for folder in folders.values() for each in images):
        raise ValueError(
            f"{destination} lies in the images of {location}, where it would pass for classes or "
            "take their place; choose another destination"
        )
    for split, source in opened.items():
        folder = folders[split]
        settings = {"shorter_side": shorter_side, "quality": quality}
        _pack_split(source, folder, split, settings, workers, progress)
        if verify:
            PackedSource(folder).verify()


def _pack_split(
    source: Source,
    folder: Path,
    split: str,
    settings: dict[str, int],
    workers: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    plan = {**settings, "source": source.fingerprint(), "records_per_file": RECORDS_PER_FILE}
    _agree(folder, plan)
    if (folder / "index.npz").exists():
        return
    for left_over in folder.glob(".*.tmp"):
        left_over.unlink()
    files = [
        range(first, min(first + RECORDS_PER_FILE, len(source)))
        for first in range(0, len(source), RECORDS_PER_FILE)
    ]
    bar = tqdm(
        total=len(source), desc=f"packing {split}", unit="img", disable=None if progress else True
    )
    to_do = []
    for number, indices in enumerate(files):
        if _note_path(folder, number).exists():
            bar.update(len(indices))
        else:
            to_do.append(number)
    try:
        for number in _written(source, folder, files, to_do, settings, workers):
            bar.update(len(files[number]))
    finally:
        bar.close()
    _write_index(folder, source.classes, plan, len(files))


def _agree(folder: Path, plan: dict[str, Any]) -> None:
    """Note what is being packed, or refuse to mix it with something else."""
    path = folder / "plan.json"
    if path.exists():
        begun = json.loads(path.read_text())
        differing = [key for key in plan if begun.get(key) != plan[key]]
        if differing:
            raise ValueError(
                f"{folder} was begun with other settings: "
                + ", ".join(f"{key} {begun.get(key)} there, {plan[key]} now" for key in differing)
                + "; choose another destination or delete it"
            )
    write_atomically(path, (json.dumps(plan, indent=2) + "\n").encode())


def _note_path(folder: Path, number: int) -> Path:
    return folder / f"records-{number:05}.json"


def _written(
    source: Source,
    folder: Path,
    files: list[range],
    to_do: list[int],
    settings: dict[str, int],
    workers: int,
) -> Iterator[int]:
    """Write the record files that are missing; the number of each as it is complete."""
    workers = min(workers, len(to_do))
    if workers <= 1:
        for number in to_do:
            _write_file(source, folder, number, files[number], settings)
            yield number
        return
    # New processes, not forks: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (source,))
    try:
        futures = {
            pool.submit(_write_in_worker, folder, number, files[number], settings): number
            for number in to_do
        }
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(cancel_futures=True)


_worker_source: Source


def _start(source: Source) -> None:
    global _worker_source
    _worker_source = source  # sent once, not with every task
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _write_in_worker(folder: Path, number: int, indices: range, settings: dict[str, int]) -> None:
    _write_file(_worker_source, folder, number, indices, settings)


def _end_with_parent() -> None:
    """End this worker when the main process has been killed, which no signal tells it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _write_file(
    source: Source, folder: Path, number: int, indices: range, settings: dict[str, int]
) -> None:
    """One record file, then the note of what it holds."""
    entries: list[tuple[str, int, int]] = []
    damaged: dict[str, str] = {}
    records: list[bytes] = []
    unreadable = 0
    for index in indices:
        try:
            data, label, name = source[index]
            record = repacked(data, name, **settings)
        except (DamagedImage, OSError) as error:
            unreadable += isinstance(error, OSError)
            if unreadable > UNREADABLE:
                raise SourceError(
                    f"{unreadable} images of {source.location} cannot be read: {error}; is it "
                    "still there? Start again to go on"
                ) from error
            damaged[source.name(index)] = getattr(error, "reason", str(error))
            continue
        records.append(record)
        entries.append((name, label, len(record)))
    content = b"".join(records)
    path = folder / f"records-{number:05}.bin"
    write_atomically(path, content)
    note = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "entries": entries,
        "damaged": damaged,
    }
    write_atomically(_note_path(folder, number), json.dumps(note).encode())


def _write_index(folder: Path, classes: list[str], plan: dict[str, Any], files: int) -> None:
    names, labels, lengths, offsets, numbers = [], [], [], [], []
    checksums: dict[str, str] = {}
    damaged: dict[str, str] = {}
    for number in range(files):
        note = json.loads(_note_path(folder, number).read_text())
        checksums[f"records-{number:05}.bin"] = note["sha256"]
        damaged |= note["damaged"]
        offset = 0
        for name, label, length in note["entries"]:
            names.append(os.fsencode(name))
            labels.append(label)
            lengths.append(length)
            offsets.append(offset)
            numbers.append(number)
            offset += length
    about = {"version": PackedSource.VERSION, "classes": classes, "sha256": checksums, **plan}
    if not names:
        raise SourceError(f"none of the {len(damaged)} images for {folder} can be decoded")
    index = io.BytesIO()
    np.savez(
        index,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        names=np.array(names),
        labels=np.array(labels, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        offsets=np.array(offsets, dtype=np.int64),
        files=np.array(numbers, dtype=np.int64),
    )
    write_atomically(folder / "damaged.tsv", _table(damaged.items()))
    write_atomically(folder / "index.npz", index.getvalue())
    for number in range(files):
        _note_path(folder, number).unlink()


def _table(rows: Iterable[tuple[str, str]]) -> bytes:
    lines = ["name\treason", *("\t".join(row) for row in rows)]
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m bnlib pack``.

    Parameters
    ----------
    argv
        Its arguments; the process's own by default.

    Returns
    -------
    int
        Exit status: 0, or 1 with a message on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bnlib pack", description="Write a smaller copy of a data set, fast to read."
    )
    parser.add_argument("source", help="folder, archives' folder or hf:NAME")
    parser.add_argument("destination", help="folder, made if need be")
    parser.add_argument("--shorter-side", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default 90)")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read everything again and compare it with its checksums",
    )
    arguments = parser.parse_args(argv)
    options = vars(arguments)
    source, destination = options.pop("source"), options.pop("destination")
    try:
        pack(source, destination, **options)
        for split in arguments.splits:
            folder = Path(destination).expanduser() / split
            damaged = (folder / "damaged.tsv").read_text(errors="surrogateescape").count("\n") - 1
            note = f", {damaged} damaged ones left out (damaged.tsv)" if damaged else ""
            print(f"{folder}: {len(PackedSource(folder))} images{note}")
    except (SourceError, ValueError, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            "pack: a worker was killed; is memory short? Start again with fewer --workers to go on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("pack: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0
