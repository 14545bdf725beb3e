"""Tables in the style of the book."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """An HTML table that scrolls sideways on a narrow page.

    Parameters
    ----------
    head
        The columns' headings, as HTML.
    rows
        The cells, as HTML; each row as long as ``head``.

    Returns
    -------
    IPython.display.HTML
        For the end of a cell.

    Raises
    ------
    ValueError
        If a row is longer or shorter than the head.
    """
    from IPython.display import HTML

    lines = []
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the head {len(head)}: {list(row)}")
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return HTML(
        f'<div class="bn-scroll"><table class="bn-table"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
