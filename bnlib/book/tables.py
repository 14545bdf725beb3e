"""Tables in the style of the book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML

__all__ = ["table"]


def table(data: Any, columns: Sequence[str] | None = None) -> Any:
    """A DataFrame as an HTML table that scrolls sideways on a narrow page, to end a cell with.

    ``data`` and ``columns`` are as for ``pandas.DataFrame``: a frame, or equally long rows and the
    columns' headings. Text, in the headings too, is HTML.
    """
    frame = pd.DataFrame(data, columns=columns)
    with pd.option_context("display.max_colwidth", None):
        page = frame.to_html(index=False, escape=False, border=0, justify="left")
    page = page.replace('class="dataframe"', 'class="bn-table"', 1)
    return HTML(f'<div class="bn-scroll">{page}</div>')
