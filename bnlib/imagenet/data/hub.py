"""Images of data sets in the Hugging Face format, from a folder or from the hub.

Data sets on disk are memory-mapped where they are; only Parquet files are converted first, into
``.cache`` beside them or, if that is set, ``$HF_DATASETS_CACHE``.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bnlib.imagenet.data.source import SPLITS, Example, Source, SourceError
from bnlib.runs import write_atomically

__all__ = ["HubSource", "from_folder", "from_hub"]

NAME_COLUMN = "file_name"  # where there is such a column of strings, it names the images


class HubSource(Source):
    """Images of a ``datasets.Dataset`` that has a column of images and one of labels.

    A column ``file_name`` names the images; without it, they are named by their row.
    """

    def __init__(self, dataset: Any, location: str) -> None:
        datasets = load_datasets()
        self.location = location
        features = dataset.features
        images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
        labeled = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
        labeled += [name for name in ("label", "labels", "fine_label") if name in features]
        if not images or not labeled:
            raise SourceError(
                f"{location} has the columns {list(features)}; one of images (type Image) and one "
                "of labels (type ClassLabel, or called label) are needed"
            )
        image, label = images[0], labeled[0]
        self._image = image
        labels = dataset.select_columns([label])[:][label]
        self.labels = np.array([-1 if value is None else value for value in labels], dtype=np.int64)
        if not len(self.labels) or self.labels.min() < 0:
            raise SourceError(
                f"{location} has {len(self.labels)} examples, of which "
                f"{(self.labels < 0).sum()} have no label; a labeled split is needed"
            )
        names = getattr(features[label], "names", None)
        self.classes = list(names or map(str, range(int(self.labels.max()) + 1)))
        self._named = features.get(NAME_COLUMN) == datasets.Value("string")
        rows = dataset.select_columns([image, NAME_COLUMN] if self._named else [image])
        self._rows = rows.cast_column(image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        """The image's own name, or the split and the row's number."""
        if not self._named:
            return f"{self.location}[{index}]"
        return str(self._rows[int(index)][NAME_COLUMN])

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)]
        image = row[self._image] or {}
        data = image.get("bytes")
        if data is None:
            if image.get("path") is None:
                raise OSError(f"row {index} of {self.location} holds no image")
            data = Path(image["path"]).read_bytes()
        name = row[NAME_COLUMN] if self._named else self.name(index)
        return Example(data, int(self.labels[index]), name)

    def _names_and_sizes(self) -> Iterable[tuple[str, int]]:
        import pyarrow.compute as pc

        if self._named:
            names = self._rows.select_columns([NAME_COLUMN])[:][NAME_COLUMN]
        else:
            names = map(self.name, range(len(self)))
        if self._rows._indices is not None:  # a selection of rows: no cheap way
            return zip(names, (len(self[index].data) for index in range(len(self))), strict=True)
        column = self._rows.data.column(self._image)
        sizes = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), 0)
        return zip(names, sizes.to_pylist(), strict=True)


def load_datasets() -> Any:
    """The package ``datasets``, or an error that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            "Hugging Face data sets and packed copies need the package datasets: "
            "pip install datasets"
        ) from error
    return datasets


@contextmanager
def _without_progress_bars() -> Iterator[Any]:
    """The package ``datasets``, kept from drawing progress bars of its own."""
    datasets = load_datasets()
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def from_hub(name: str, split: str) -> HubSource:
    """A data set of the hub, by name."""
    datasets = load_datasets()
    if not name:
        raise SourceError("hf: needs the name of a data set, such as hf:ILSVRC/imagenet-1k")
    try:
        chosen = _split_of(datasets.get_dataset_split_names(name), split, f"hf:{name}")
        return HubSource(datasets.load_dataset(name, split=chosen), f"hf:{name}/{split}")
    except SourceError:
        raise
    except Exception as error:  # the network, the hub and its permissions fail in many ways
        raise SourceError(
            f"the data set {name!r} cannot be had from the Hugging Face hub: {error}"
        ) from error


def from_folder(root: Path, split: str) -> HubSource | None:
    """A data set in a folder, if there is one: from ``save_to_disk``, or Parquet or Arrow files."""
    location = f"{root}/{split}"
    for folder in (root, *(root / alias for alias in SPLITS[split])):
        if any((folder / f"dataset_{kind}.json").exists() for kind in ("dict", "info")):
            return HubSource(_saved(folder, root, split), location)
    for kind, read in (("parquet", _parquet), ("arrow", _arrow)):
        for alias in SPLITS[split]:
            patterns = [f"{place}{alias}{end}" for place in ("", "data/") for end in ("-*.", ".")]
            files = sorted(str(f) for pattern in patterns for f in root.glob(pattern + kind))
            if files:
                return HubSource(_read(read, files, root), location)
    return None


def _saved(folder: Path, root: Path, split: str) -> Any:
    """What ``save_to_disk`` wrote to a folder that is the root, or the split's in it."""
    datasets = load_datasets()
    loaded = _read(datasets.load_from_disk, str(folder), folder)
    if isinstance(loaded, datasets.DatasetDict):
        return loaded[_split_of(list(loaded), split, str(root))]
    if folder == root and loaded.split is not None:
        _split_of([str(loaded.split)], split, str(root))
    elif folder == root and split != "train":
        raise SourceError(f"{root} holds one data set that does not say that it is for {split}")
    return loaded


def _parquet(files: list[str]) -> Any:
    cache = os.environ.get("HF_DATASETS_CACHE", os.path.join(os.path.dirname(files[0]), ".cache"))
    return load_datasets().Dataset.from_parquet(files, cache_dir=cache)


def _arrow(files: list[str]) -> Any:
    datasets = load_datasets()
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _read(read: Callable[[Any], Any], what: Any, folder: Path) -> Any:
    with _without_progress_bars():
        try:
            return read(what)
        except Exception as error:  # Arrow and Parquet readers fail in many ways on damaged files
            raise SourceError(f"the data set in {folder} cannot be read: {error}") from error


def _split_of(known: list[str], split: str, location: str) -> str:
    if found := [alias for alias in SPLITS[split] if alias in known]:
        return found[0]
    raise SourceError(
        f"{location} has the splits {', '.join(known)}; for {split} one of "
        f"{', '.join(SPLITS[split])} is needed"
    )


def image_features(classes: list[str]) -> Any:
    """The columns of a packed copy: an image, its class, its name."""
    datasets = load_datasets()
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=classes),
            NAME_COLUMN: datasets.Value("string"),
        }
    )


def arrow_stream(rows: list[dict[str, Any]], features: Any) -> memoryview:
    """An Arrow file with these rows."""
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, features.arrow_schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, features.arrow_schema))
    return memoryview(stream.getvalue())


def make_data_set(folder: Path, files: list[str], features: Any) -> None:
    """Write beside Arrow files what makes them a data set as ``save_to_disk`` writes it."""
    with _without_progress_bars() as datasets, tempfile.TemporaryDirectory() as scratch:
        # what it says of a data set without rows, but with these files
        columns: dict[str, list[Any]] = {name: [] for name in features}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(scratch)
        state = json.loads(Path(scratch, "state.json").read_text())
        info = Path(scratch, "dataset_info.json").read_bytes()
    state["_data_files"] = [{"filename": name} for name in files]
    state["_fingerprint"] = uuid.uuid4().hex[:16]  # under which `datasets` caches what it derives
    write_atomically(folder / "state.json", json.dumps(state, indent=2).encode())
    write_atomically(folder / "dataset_info.json", info)  # last: now it is one
