"""Images of data sets in the Hugging Face format, from a folder or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bnlib.imagenet.data.source import Example, Source, SourceError

__all__ = ["HubSource", "from_folder", "from_hub"]

# What data sets call the part for training and the part that the paper evaluates on.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


class HubSource(Source):
    """Images of a data set in the Hugging Face format, undecoded.

    Parameters
    ----------
    dataset
        A ``datasets.Dataset`` with a column of images and one of labels.
    location
        For messages.

    Raises
    ------
    SourceError
        If there is no column of images or of labels, or labels are missing.
    """

    def __init__(self, dataset: Any, location: str) -> None:
        datasets = _datasets()
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
        column = dataset.select_columns([image])
        self._rows = column.cast_column(image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        """The split and the number of the row."""
        return f"{self.location}[{index}]"

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)][self._image]
        data, path = row["bytes"], row["path"]
        if data is None:
            data = Path(path).read_bytes()
        return Example(data, int(self.labels[index]), self.name(index))

    def _sizes(self) -> Iterable[int]:
        import pyarrow.compute

        if self._rows._indices is not None:  # a selection of rows: no cheap way
            return (len(self[index].data) for index in range(len(self)))
        column = self._rows.data.column(self._image)
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes"))
        return (size or 0 for size in sizes.to_pylist())


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            "reading Hugging Face data sets needs the package datasets: pip install 'bnlib[hub]'"
        ) from error
    return datasets


def from_hub(name: str, split: str) -> HubSource:
    """A data set of the hub, by name.

    Raises
    ------
    SourceError
        If it cannot be had, or has no such split.
    """
    datasets = _datasets()
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
    """A data set in a folder: as ``save_to_disk`` writes it, or Parquet or Arrow files.

    Raises
    ------
    SourceError
        If there is a data set without such a split, or it cannot be read.
    """
    location = f"{root}/{split}"
    saved = [root, *(root / alias for alias in SPLITS[split])]
    for folder in saved:
        if not any((folder / f"dataset_{kind}.json").exists() for kind in ("dict", "info")):
            continue
        datasets = _datasets()
        loaded = _read(lambda: datasets.load_from_disk(str(folder)), folder)  # noqa: B023
        if isinstance(loaded, datasets.DatasetDict):
            return HubSource(loaded[_split_of(list(loaded), split, str(root))], location)
        if folder == root and loaded.split is not None:
            _split_of([str(loaded.split)], split, str(root))
        elif folder == root and split != "train":
            raise SourceError(f"{root} holds one data set that does not say that it is for {split}")
        return HubSource(loaded, location)
    for kind in ("parquet", "arrow"):
        for alias in SPLITS[split]:
            patterns = [f"{place}{alias}{end}" for place in ("", "data/") for end in ("-*.", ".")]
            files = sorted(str(f) for pattern in patterns for f in root.glob(pattern + kind))
            if files:
                load = _datasets().load_dataset
                loaded = _read(lambda: load(kind, data_files=files, split="train"), root)  # noqa: B023
                return HubSource(loaded, location)
    return None


def _read(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except Exception as error:  # Arrow and Parquet readers fail in many ways on damaged files
        raise SourceError(f"the data set in {folder} cannot be read: {error}") from error


def _split_of(known: list[str], split: str, location: str) -> str:
    for alias in SPLITS[split]:
        if alias in known:
            return alias
    raise SourceError(
        f"{location} has the splits {', '.join(known)}; for {split} one of "
        f"{', '.join(SPLITS[split])} is needed"
    )
