"""JPEG files from the outside: their header, and a horizontal band cut out without decoding.

A JPEG (ITU-T T.81) is a row of segments, each behind a two-byte marker, and then the compressed
pixels in blocks, from left to right and top to bottom. One cannot start to read in the middle of
them, except behind a restart marker. Where such markers stand at the ends of rows of blocks, as
:mod:`bnlib.imagenet.data.pack` writes them, some rows of blocks with a corrected header are a JPEG of
their own: cutting it out takes microseconds and spares decoding the rest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["Header", "band", "read_header"]

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: the three that all decoders know
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
_EXIF, _ADOBE, _SCAN, _RESTARTS, _END = 0xE1, 0xEE, 0xDA, 0xDD, b"\xff\xd9"


@dataclass(frozen=True)
class Header:
    """What the segments before the pixels say.

    Attributes
    ----------
    width
        Pixels of a row, as stored.
    height
        Rows, as stored.
    components
        1 for gray, 3 for color, 4 for print colors.
    exif
        The Exif segment, which may say that the photograph is to be turned, or None.
    rgb
        Whether the file may hold red, green and blue, not luminance and two color differences.
    height_at
        Where the height stands in the file.
    pixels_at
        Where the compressed pixels begin.
    block_rows
        Pixel rows of a row of blocks.
    restart_rows
        Rows of blocks between restart markers; 0 if there are none at the ends of rows.
    """

    width: int
    height: int
    components: int
    exif: bytes | None
    rgb: bool
    height_at: int
    pixels_at: int
    block_rows: int
    restart_rows: int


def read_header(data: bytes) -> Header | None:
    """The header of an ordinary JPEG: Huffman-coded, eight bits per component, of known size.

    Parameters
    ----------
    data
        A whole file.

    Returns
    -------
    Header or None
        None for a file that is no such JPEG or is damaged before its pixels.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frame: tuple[int, int, int, int, int] | None = None
    sampling: list[tuple[int, int]] = []
    names, transform = b"", 1
    exif, interval, at = None, 0, 2
    try:
        while True:
            while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
                at += 1
            if data[at] != 0xFF:
                return None
            kind = data[at + 1]
            (length,) = struct.unpack_from(">H", data, at + 2)
            if kind in _FRAMES:
                precision, height, width, count = struct.unpack_from(">BHHB", data, at + 4)
                if precision != 8 or not height or not width or count not in (1, 3, 4):
                    return None
                frame = (kind, width, height, count, at + 5)
                sampling = [divmod(data[at + 11 + 3 * i], 16) for i in range(count)]
                names = data[at + 10 : at + 10 + 3 * count : 3]
            elif kind in _OTHER_FRAMES:
                return None
            elif kind == _EXIF and data[at + 4 : at + 10] == b"Exif\0\0":
                exif = data[at + 4 : at + 2 + length]
            elif kind == _ADOBE and data[at + 4 : at + 9] == b"Adobe":
                transform = data[at + 15]
            elif kind == _RESTARTS:
                (interval,) = struct.unpack_from(">H", data, at + 4)
            elif kind == _SCAN:
                break
            at += 2 + length
        in_scan = data[at + 4]
    except (IndexError, struct.error):
        return None
    if frame is None:
        return None
    kind, width, height, count, height_at = frame
    across, down = (1, 1) if count == 1 else (max(s[i] for s in sampling) for i in (0, 1))
    if not across or not down:
        return None
    blocks = -(-width // (8 * across))
    whole = kind != 0xC2 and in_scan == count and interval and interval % blocks == 0
    return Header(
        width=width,
        height=height,
        components=count,
        exif=exif,
        rgb=count == 3 and (transform == 0 or names == b"RGB"),
        height_at=height_at,
        pixels_at=at + 2 + length,
        block_rows=8 * down,
        restart_rows=interval // blocks if whole else 0,
    )


def is_complete(data: bytes, header: Header) -> bool:
    """Whether an end-of-image marker follows the pixels; without it the file was cut short."""
    return data.rfind(_END, header.pixels_at) >= 0


def band(data: bytes, header: Header, top: int, bottom: int) -> tuple[bytes, int]:
    """A JPEG that shows at least the pixel rows from ``top`` to before ``bottom``.

    It holds one row of blocks more on each side, so that the pixels of the rows asked for come out
    exactly as from the whole file, although decoders smooth colors across blocks.

    Parameters
    ----------
    data
        A whole file.
    header
        Its header.
    top, bottom
        Pixel rows.

    Returns
    -------
    data : bytes
        A JPEG; the whole file where nothing can be cut off.
    first : int
        The row of the photograph that is its first.
    """
    rows = header.restart_rows * header.block_rows  # pixel rows between restart markers
    if not rows:
        return data, 0
    pieces = -(-header.height // rows)
    first = max(0, top - header.block_rows) // rows
    last = min(pieces, -(-(bottom + header.block_rows) // rows))
    if first == 0 and last == pieces:
        return data, 0
    starts = [header.pixels_at]
    for piece in range(last if last < pieces else pieces - 1):
        found = data.find(bytes((0xFF, 0xD0 + piece % 8)), starts[-1])
        if found < 0:
            return data, 0
        starts.append(found + 2)
    ends = [start - 2 for start in starts[1:]]
    if last == pieces:
        ends.append(data.rfind(_END))
    head = bytearray(data[: header.pixels_at])
    height = min(header.height, last * rows) - first * rows
    struct.pack_into(">H", head, header.height_at, height)
    parts = [bytes(head)]
    for number, piece in enumerate(range(first, last)):
        if number:
            parts.append(bytes((0xFF, 0xD0 + (number - 1) % 8)))
        parts.append(data[starts[piece] : ends[piece]])
    return b"".join((*parts, _END)), first * rows
