"""The look of figures: seaborn's theme with the book's colors, and otherwise matplotlib's."""

import matplotlib as mpl
import pytest
import seaborn as sns

from bnlib.book import style


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
    assert mpl.rcParams["font.size"] == 10.5
    sns.set_theme()
    assert mpl.rcParams["axes.labelsize"] != mpl.rcParamsDefault["axes.labelsize"]
