"""Data sets in the Hugging Face format."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
from image_sets import GOOD

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SourceError


@pytest.mark.parametrize("form", ["saved", "saved split", "parquet", "arrow"])
def test_hugging_face_data_sets_give_the_same_examples(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    plain = open_source(folder, "val")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=plain.classes)}
    )
    rows = {
        "image": [{"bytes": plain[i].data, "path": plain[i].name} for i in range(len(plain))],
        "label": plain.labels.tolist(),
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    if form == "saved":
        datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(tmp_path / "set")
    elif form == "parquet":
        (tmp_path / "set" / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet")
    elif form == "saved split":
        made.save_to_disk(tmp_path / "set" / "val")
    else:
        made.save_to_disk(tmp_path / "saved", num_shards=2)
        (tmp_path / "set").mkdir()
        for path in (tmp_path / "saved").glob("*.arrow"):
            path.rename(tmp_path / "set" / path.name.replace("data", "validation"))
    source = open_source(tmp_path / "set", "val")
    assert source.classes == plain.classes
    assert source.labels.tolist() == plain.labels.tolist()
    assert [source[i][:2] for i in range(len(source))] == [plain[i][:2] for i in range(len(plain))]
    assert source.fingerprint() == open_source(tmp_path / "set", "val").fingerprint()
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3].data == source[3].data


def test_a_missing_package_for_hugging_face_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install datasets"):
        open_source("hf:ILSVRC/imagenet-1k", "train")


def test_a_hub_data_set_without_a_name_is_refused() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(SourceError, match="such as hf:ILSVRC/imagenet-1k"):
        open_source("hf:", "train")


def test_a_data_set_without_the_split_or_the_labels_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [{"bytes": GOOD, "path": None}], "text": ["a"]})
    made = made.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path)
    with pytest.raises(SourceError, match="has the splits train; for val"):
        open_source(tmp_path, "val")
    with pytest.raises(SourceError, match=r"columns \['image', 'text'\]"):
        open_source(tmp_path, "train")
