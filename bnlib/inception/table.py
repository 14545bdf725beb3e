"""Figure 5 of the paper as one table, in the figure's own column order."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["FIGURE5", "MODULES", "Row", "repaired", "scaled"]


class Row(NamedTuple):
    """One line of Figure 5; 0 where the figure has a blank or a zero."""

    type: str
    patch: int
    stride: int
    output: tuple[int, int]  # size of the map on images of 224 x 224, and channels
    depth: int
    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce_double3x3: int
    double3x3: int
    pool: str
    projection: int


#: The fifteen lines as printed, with what contradicts itself in them.  4c and 4d concatenate to 608
#: channels, not to 576; 3c and 4e state the size before their stride.
FIGURE5 = (
    # type      patch stride output  depth  1x1  3x3r  3x3  d3x3r d3x3  pool + projection
    Row("conv1",    7, 2, (112, 64),   1,    0,    0,    0,    0,    0, "",      0),
    Row("pool1",    3, 2, (56, 64),    0,    0,    0,    0,    0,    0, "max",   0),
    Row("conv2",    3, 1, (56, 192),   1,    0,   64,  192,    0,    0, "",      0),
    Row("pool2",    3, 2, (28, 192),   0,    0,    0,    0,    0,    0, "max",   0),
    Row("3a",       0, 1, (28, 256),   3,   64,   64,   64,   64,   96, "avg",  32),
    Row("3b",       0, 1, (28, 320),   3,   64,   64,   96,   64,   96, "avg",  64),
    Row("3c",       0, 2, (28, 576),   3,    0,  128,  160,   64,   96, "max",   0),
    Row("4a",       0, 1, (14, 576),   3,  224,   64,   96,   96,  128, "avg", 128),
    Row("4b",       0, 1, (14, 576),   3,  192,   96,  128,   96,  128, "avg", 128),
    Row("4c",       0, 1, (14, 576),   3,  160,  128,  160,  128,  160, "avg", 128),
    Row("4d",       0, 1, (14, 576),   3,   96,  128,  192,  160,  192, "avg", 128),
    Row("4e",       0, 2, (14, 1024),  3,    0,  128,  192,  192,  256, "max",   0),
    Row("5a",       0, 1, (7, 1024),   3,  352,  192,  320,  160,  224, "avg", 128),
    Row("5b",       0, 1, (7, 1024),   3,  352,  192,  320,  192,  224, "max", 128),
    Row("avg pool", 7, 1, (1, 1024),   0,    0,    0,    0,    0,    0, "avg",   0),
)  # fmt: skip

#: The ten Inception modules.
MODULES = tuple(row for row in FIGURE5 if row.depth == 3)


def scaled(row: Row, width: float) -> Row:
    """The row with every channel count times ``width``, to the nearest multiple of 4, at least 8.

    A blank stays a blank.  With 1 nothing changes.
    """

    def times(channels: int) -> int:
        return max(8, 4 * int(channels * width / 4 + 0.5)) if channels else 0

    fields = ("conv1x1", "reduce3x3", "conv3x3", "reduce_double3x3", "double3x3", "projection")
    counts: dict[str, Any] = {field: times(getattr(row, field)) for field in fields}
    return row._replace(output=(row.output[0], times(row.output[1])), **counts)


def repaired(pool_proj_4cd: int, width: float = 1.0) -> tuple[Row, ...]:
    """The ten modules with another pool projection in 4c and 4d, and the channels that result.

    With 96 the outputs are the figure's 576 and 1024.  With 128, as printed, they are 608 and 1056.
    The branches are :func:`scaled` by ``width``; an output is the sum of its branches.
    """
    rows, channels = [], scaled(FIGURE5[3], width).output[1]
    for row in MODULES:
        if row.type in ("4c", "4d"):
            row = row._replace(projection=pool_proj_4cd)
        row = scaled(row, width)
        passed = row.projection or channels  # without a projection the pooled input passes through
        channels = row.conv1x1 + row.conv3x3 + row.double3x3 + passed
        rows.append(row._replace(output=(row.output[0], channels)))
    return tuple(rows)
