"""Packed copies: the same images made smaller, whatever interrupts the packing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from image_sets import GOOD, damage
from images import encoded, synthetic, write_folder
from tqdm import tqdm

from bnlib.__main__ import main as bnlib
from bnlib.imagenet.data import pack
from bnlib.imagenet.data.decode import DamagedImage, Encoded
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SourceError

datasets = pytest.importorskip("datasets")
SETTINGS = ["--shorter-side", "64", "--quality", "95"]


def test_the_packed_copy_has_the_same_images_made_smaller(folder: Path, packed: Path) -> None:
    for split in ("train", "val"):
        plain, small = open_source(folder, split), open_source(packed, split)
        assert small.classes == plain.classes
        assert small.labels.tolist() == plain.labels.tolist()
        assert small.fingerprint() != plain.fingerprint()
        for index in range(len(plain)):
            example = small[index]
            assert example.name == small.name(index) == plain[index].name
            before, after = Encoded(plain[index].data), Encoded(example.data)
            assert min(after.width, after.height) == 64
            expected = before.resize_shorter(64).float()
            assert (after.decode().float() - expected).abs().mean() < 4
    assert (packed / "train" / "damaged.tsv").read_text() == "name\treason\n"


def test_others_read_the_packed_copy_with_datasets_alone(folder: Path, packed: Path) -> None:
    loaded = datasets.load_from_disk(packed / "val")
    assert loaded.features["label"].names == ["ant", "bee", "cat"]
    example = loaded[5]
    assert example["file_name"] == "bee/001.JPEG"
    assert example["label"] == 1
    ours = Encoded(open_source(packed, "val")[5].data).decode()
    theirs = np.array(example["image"].convert("RGB")).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 2


def test_a_small_jpeg_is_packed_as_it_is_and_other_images_become_jpegs() -> None:
    assert pack.repacked(GOOD, "a", 72, 90) == GOOD
    assert pack.repacked(GOOD, "a", 71, 90) != GOOD
    packed_png = pack.repacked(encoded(synthetic(3), "PNG"), "a", 72, 90)
    assert Encoded(packed_png).is_ordinary_jpeg
    with pytest.raises(DamagedImage):
        pack.repacked(GOOD[:-300], "a", 72, 90)


def test_damaged_images_are_left_out_of_the_packed_copy_and_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined = damage(folder, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "cat" / os.fsdecode(b"\xff.png")).write_bytes(GOOD)
    arguments = [str(tmp_path / "copy"), str(tmp_path / "packed"), "--splits", "train"]
    assert pack.main([*arguments, "--workers", "1"]) == 0
    assert "34 images, 3 damaged ones left out" in capsys.readouterr().out
    source = open_source(tmp_path / "packed", "train")
    names = {source[index].name for index in range(len(source))}
    assert len(names) == 34
    assert names.isdisjoint(ruined)
    assert r"cat/\udcff.png" in names
    rows = (tmp_path / "packed" / "train" / "damaged.tsv").read_text().splitlines()[1:]
    assert {row.split("\t")[0] for row in rows} == set(ruined)


def test_a_data_set_of_damaged_images_alone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "train" / "ant").mkdir(parents=True)
    (tmp_path / "images" / "train" / "ant" / "1.png").write_bytes(b"no image")
    arguments = [str(tmp_path / "images"), str(tmp_path / "packed"), "--splits", "train"]
    assert bnlib(["pack", *arguments]) == 1
    assert "none of the 1 images" in capsys.readouterr().err


def test_a_packed_copy_with_a_changed_bit_is_noticed(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    path = tmp_path / "copy" / "val" / "data-00000-of-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert bnlib(["pack", str(folder), str(tmp_path / "copy"), *SETTINGS]) == 1
    assert f"{path.name} is not what was packed" in capsys.readouterr().err
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"val cannot be read"):
        open_source(tmp_path / "copy", "val")
    path.unlink()
    with pytest.raises(SourceError, match=r"val cannot be read.*data-00000-of-00001\.arrow"):
        open_source(tmp_path / "copy", "val")


def test_a_destination_begun_with_other_settings_is_refused(
    folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = ["pack", str(folder), str(packed)]
    assert bnlib([*begun, "--shorter-side", "32", "--quality", "95"]) == 1
    assert "shorter_side 64 there, 32 now" in capsys.readouterr().err
    assert bnlib([*begun, "--quality", "0"]) == 1
    assert "quality 0" in capsys.readouterr().err
    assert bnlib(["pack", str(folder / "nowhere"), str(packed)]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_destination_with_something_else_or_in_the_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "images", train=1, val=1)
    before = sorted(source.rglob("*"))
    for destination in (source, source / "train", source / "train" / "ant"):
        assert bnlib(["pack", str(source), str(destination)]) == 1
        assert "choose another destination" in capsys.readouterr().err
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / "thesis.tex").write_text("")
    assert bnlib(["pack", str(source), str(tmp_path / "other")]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert sorted(source.rglob("*")) == before


def test_a_copy_in_the_old_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.npz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no longer read; .* again with python -m bnlib pack"):
        open_source(tmp_path, "train")


def same_content(ours: Path, theirs: Path) -> bool:
    names = [sorted(path.name for path in folder.iterdir()) for folder in (ours, theirs)]
    differing = [n for n in names[0] if (ours / n).read_bytes() != (theirs / n).read_bytes()]
    return names[0] == names[1] and differing == ["state.json"]  # which has a random number


@pytest.mark.parametrize("workers", [1, 2])
def test_packing_that_was_killed_at_any_moment_continues(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "IMAGES_PER_FILE", 2)
    arguments = [*SETTINGS, "--splits", "train", "--workers", str(workers), "--no-verify"]
    start = time.monotonic()
    whole = fork([str(folder), str(tmp_path / "whole"), *arguments])
    whole.join()
    duration = time.monotonic() - start
    destination, random_ = tmp_path / "packed" / "train", random.Random()
    listed: dict[Path, int] = {}
    for number in range(8):
        process = fork([str(folder), str(tmp_path / "packed"), *arguments])
        if number % 2:  # when another part has been done
            while process.is_alive() and len(complete_files(destination)) <= len(listed):
                time.sleep(0.001)
        else:
            time.sleep(duration * random_.uniform(0, 0.5))
        (process.kill if number % 4 < 2 else process.terminate)()
        process.join()
        assert all(path.stat().st_mtime_ns == when for path, when in listed.items()), "done twice"
        listed = complete_files(destination)
        if not (destination / "dataset_info.json").exists():
            with pytest.raises(SourceError):
                open_source(tmp_path / "packed", "train")
    assert len(listed) >= 4
    last = fork([str(folder), str(tmp_path / "packed"), *arguments])
    last.join()
    assert last.exitcode == 0
    deadline = time.monotonic() + 30  # until the workers of killed processes have ended
    while not same_content(destination, tmp_path / "whole" / "train"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fork(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """Pack in a process that has the imports already."""

    def run() -> None:
        tqdm.set_lock(threading.RLock())  # its own: tqdm's is shared, and would stay locked
        sys.exit(pack.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def complete_files(folder: Path) -> dict[Path, int]:
    """The files that are listed as complete, and when they were written."""
    if not (folder / "pack.json").exists():
        return {}
    names = json.loads((folder / "pack.json").read_text())["files"]
    return {folder / name: (folder / name).stat().st_mtime_ns for name in names}


def test_a_full_disk_and_an_interruption_are_reported_and_packing_continues_after_them(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pack, "IMAGES_PER_FILE", 10)
    write = pack.write_atomically

    error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("data-00002"):
            raise error
        write(path, data)

    monkeypatch.setattr(pack, "write_atomically", full)
    arguments = [str(folder), str(tmp_path), "--splits", "train", "--workers"]
    for workers in ("1", "2"):
        assert pack.main([*arguments, workers]) == 1
        assert "No space left on device; start it again to continue" in capsys.readouterr().err
        assert len(complete_files(tmp_path / "train")) == 2
    error = KeyboardInterrupt()
    assert pack.main([*arguments, "1"]) == 130
    assert "interrupted; start it again to continue" in capsys.readouterr().err
    monkeypatch.setattr(pack, "write_atomically", write)
    assert pack.main([*arguments, "1"]) == 0
    assert len(open_source(tmp_path, "train")) == 36


def test_a_worker_that_dies_is_reported(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pack, "IMAGES_PER_FILE", 10)
    here = os.getpid()

    def dying(*_: object, **__: object) -> bytes:
        assert os.getpid() != here
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    arguments = [str(folder), str(tmp_path), "--splits", "train"]
    with monkeypatch.context() as patched:
        patched.setattr(pack, "repacked", dying)
        assert bnlib(["pack", *arguments, "--workers", "2"]) == 1
    assert "Is memory short? Try fewer --workers" in capsys.readouterr().err
    assert pack.main([*arguments, "--workers", "1"]) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_source_that_disappears_is_not_taken_for_damaged_images(
    workers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_folder(tmp_path / "images", train=8, val=0)
    source = open_source(tmp_path / "images", "train")
    source.fingerprint()
    shutil.rmtree(tmp_path / "images" / "train")
    monkeypatch.setattr(pack, "open_source", lambda *_: source)
    monkeypatch.setattr(pack, "IMAGES_PER_FILE", 12)
    arguments = [str(tmp_path / "images"), str(tmp_path / "packed"), "--splits", "train"]
    assert bnlib(["pack", *arguments, "--workers", workers]) == 1
    assert "11 images of" in (message := capsys.readouterr().err)
    assert "is it still there?" in message
    assert "Traceback" not in message
    assert not complete_files(tmp_path / "packed" / "train")


ALONE = """
import os, socket, sys
from pathlib import Path

def refuse(*_):
    raise AssertionError("a connection")

socket.socket.connect = socket.getaddrinfo = refuse
from bnlib.imagenet.data import pack
from bnlib.imagenet.data.folders import open_source
assert pack.main(sys.argv[1:]) == 0
packed = Path(sys.argv[2])
assert len(open_source(packed, "val")) == 12
import datasets
loaded = datasets.load_from_disk(str(packed / "val"))
datasets.disable_progress_bars()
loaded.to_parquet(str(packed / "more" / "validation.parquet"))
assert len(open_source(packed / "more", "val")) == 12
"""


def test_packing_and_reading_need_no_network_and_leave_nothing_in_the_home_folder(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG"))
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "packed"), "--splits", "val"],
        env={**kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").iterdir()) == []
    assert done.stderr == "", "no progress bars but those of a terminal"
