"""Opening a data set of 1.28 million files: time and memory of a first start, a resume, a worker.

    python benchmarks/startup.py [--files 1281167] [--classes 1000] [--quick]

Makes a tree ``train/<class>/<name>.JPEG`` of that many empty files, named as ImageNet's are, in a
temporary folder (which needs as many inodes), and opens it in new processes:

* ``no index``: lists all files, and looks at each for the fingerprint that a run records;
* ``first start``: the same, and writes the index;
* ``resume``: reads the index that the first start wrote;
* ``worker``: forked from the resumed process, as PyTorch's loader does; reads names and labels.

Printed are the seconds of ``open_source`` and ``fingerprint``, and how far they raise the process's
largest resident memory; of a worker, what it has written and shares with no other process. A local
disk's files are quick to look at: on a network disk, each costs a round trip.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

IMAGENET = 1_281_167


def make_tree(root: Path, files: int, classes: int) -> None:
    """Empty files, as evenly spread over the classes as possible."""
    for label, part in enumerate(np.array_split(np.arange(files), classes)):
        wnid = f"n{1440764 + 13 * label:08}"
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        for number in part:
            os.close(os.open(f"{folder}/{wnid}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))


def megabytes(field: str, path: str = "/proc/self/status") -> float:
    """A field of the kernel's account of this process's memory, as "VmHWM", the peak."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise ValueError(f"{path} has no {field}")


def measure(root: str, index: str, with_worker: bool) -> None:
    """Open the tree in this process; prints what it took."""
    from bnlib.imagenet.data.folders import open_source

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    before = megabytes("VmHWM")
    start = time.perf_counter()
    source = open_source(root, "train", Path(index) if index else None)
    opened = time.perf_counter()
    fingerprint = source.fingerprint()
    end = time.perf_counter()
    peak = megabytes("VmHWM") - before
    print(
        f"{end - start:.2f} s (listing {opened - start:.2f}, fingerprint {end - opened:.2f}), "
        f"{peak:.0f} MB, {len(source)} files, {fingerprint[:8]}",
        flush=True,
    )
    if with_worker and os.fork() == 0:
        start = time.perf_counter()
        for i in np.random.default_rng(0).integers(len(source), size=10_000):
            source.name(int(i)), int(source.labels[i])
        seconds = time.perf_counter() - start
        own = megabytes("Private_Dirty", "/proc/self/smaps_rollup")
        print(
            f"{'worker':>12}: 10,000 names and labels in {seconds:.3f} s, {own:.0f} MB of its own",
            flush=True,
        )
        os._exit(0)
    elif with_worker:
        os.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=IMAGENET)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="20,000 files, to see that it runs")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        root, index, worker = arguments.measure
        measure(root, index, bool(int(worker)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        make_tree(Path(scratch), 20_000 if arguments.quick else arguments.files, arguments.classes)
        print(f"the tree was made in {time.perf_counter() - start:.0f} s", flush=True)
        index = f"{scratch}/index.npy"
        for name, path, worker in (
            ("no index", "", "0"),
            ("first start", index, "0"),
            ("resume", index, "1"),
        ):
            print(f"{name:>12}: ", end="", flush=True)
            command = [sys.executable, __file__, "--measure", scratch, path, worker]
            subprocess.run(command, check=True)
        print(f"{'index':>12}: {os.path.getsize(index) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
