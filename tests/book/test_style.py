"""The look of figures and tables: seaborn's theme, the book's colors, matplotlib's sizes."""

import matplotlib as mpl
import pandas as pd
import pytest
import seaborn as sns

from bnlib.book import style
from bnlib.book.tables import table


@pytest.fixture
def styled():
    with mpl.rc_context():
        style.use()
        yield


@pytest.mark.usefixtures("styled")
def test_the_theme_has_the_books_palette_and_a_transparent_ground():
    assert sns.color_palette().as_hex() == [
        style.COLORS[name] for name in ("bn", "plain", "third", "fourth", "fifth", "sixth")
    ]
    for name in ("figure.facecolor", "axes.facecolor", "savefig.facecolor"):
        assert mpl.rcParams[name] == "none"
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "grid.color"):
        assert mpl.rcParams[name] == style.INK


@pytest.mark.usefixtures("styled")
def test_sizes_and_fonts_that_the_book_leaves_open_are_matplotlibs_and_not_seaborns():
    names = ("axes.labelsize", "xtick.major.size", "lines.markersize", "font.sans-serif")
    assert [mpl.rcParams[name] for name in names] == [mpl.rcParamsDefault[name] for name in names]
    assert mpl.rcParams["font.size"] == 12
    sns.set_theme()
    assert mpl.rcParams["axes.labelsize"] != mpl.rcParamsDefault["axes.labelsize"]


def test_a_table_shows_a_frame_or_rows_as_html_in_the_books_class():
    frame = pd.DataFrame({"a": ["1"], "b<br>c": ["<b>2</b>" + "x" * 100]})
    page = table(frame).data
    assert page == table(frame.to_numpy().tolist(), columns=["a", "b<br>c"]).data
    assert page.startswith('<div class="bn-scroll"><table class="bn-table">')
    assert "<th>b<br>c</th>" in page
    assert f"<td><b>2</b>{'x' * 100}</td>" in page
    for row in (["1"], ["1", "2", "3"]):
        with pytest.raises(ValueError, match=f"2 columns passed, passed data had {len(row)}"):
            table([row], columns=["a", "b"])
