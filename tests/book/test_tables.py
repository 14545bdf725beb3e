"""The book's tables."""

from __future__ import annotations

import pytest

from bnlib.book.tables import table


def test_a_table_refuses_rows_that_do_not_fit_its_head() -> None:
    page = table(["a", "b"], [["1", "<b>2</b>"]]).data
    assert "<th>a</th><th>b</th>" in page
    assert "<td>1</td><td><b>2</b></td>" in page
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        table(["a", "b"], [["1"]])
