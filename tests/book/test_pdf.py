"""The PDF of the book: pages, bookmarks and links inside it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pypdf
import pytest

from bnlib.book.pdf import join_pages, print_book

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
PAGE = '<html><head><title>t</title></head><body><article class="bd-article">{}</article></body>'


def site(folder, **articles):
    for name, article in articles.items():
        (folder / f"{name}.html").write_text(PAGE.format(article), encoding="utf-8")
    return folder


def test_links_between_the_pages_lead_inside_and_others_stay(tmp_path):
    root = site(
        tmp_path,
        one='<h1 id="top">One</h1><a href="two.html#top">a</a><a href="#top">b</a>'
        '<a href="https://arxiv.org/abs/1502.03167">c</a><a href="two.html">d</a>',
        two='<h1 id="top">Two</h1><a href="elsewhere.html">e</a>',
    )
    whole = join_pages(root, ["one", "two"])
    assert re.findall('href="([^"]*)"', whole) == [
        "#page-1-top",
        "#page-0-top",
        "https://arxiv.org/abs/1502.03167",
        "#page-1",
        "elsewhere.html",
    ]
    ids = re.findall(r'\bid="([^"]*)"', whole)
    assert len(ids) == len(set(ids)) == 4


def test_a_page_that_is_none_of_the_books_is_refused(tmp_path):
    (tmp_path / "one.html").write_text("<html><body>nothing</body></html>")
    with pytest.raises(ValueError, match="has no <article>"):
        join_pages(tmp_path, ["one"])


def test_without_chromium_it_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "bnlib.book.pdf", str(tmp_path), str(tmp_path / "book.pdf")]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)}, cwd=ROOT
    )
    assert answer.returncode == 1
    assert "needs Chromium" in answer.stderr
    assert not (tmp_path / "book.pdf").exists()


@pytest.mark.browser
@pytest.mark.skipif(not (HTML / ".rendered").exists(), reason="run `make book` first")
def test_a_printed_chapter_has_bookmarks_and_links_that_lead_to_its_pages(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium: install it, for example with `apt-get install chromium`")
    names = ["chapters/05_bn_derivative", "chapters/bibliography"]
    print_book(HTML, tmp_path / "book.pdf", names, browser)
    assert not list(HTML.glob("chapters/whole*")), "the page it is printed from is removed"
    book = pypdf.PdfReader(tmp_path / "book.pdf")
    assert 5 <= len(book.pages) <= 40
    titles = [each.title for each in book.outline if not isinstance(each, list)]
    assert len(titles) == 2
    assert titles[1].startswith("Bibliography")
    inside = set()
    for page in book.pages:
        for annotation in page.get("/Annots", []):
            action = annotation.get_object()
            if "/Dest" in action:
                inside.add(str(action["/Dest"]))
    assert inside, "no link leads inside"
    assert {name.lstrip("/") for name in inside} <= {
        name.lstrip("/") for name in book.named_destinations
    }
    text = "".join(page.extract_text() for page in book.pages[:3])
    assert "Code:" not in text, "folds are not printed"
    assert re.search(r"\n?1\s*$", book.pages[0].extract_text()), "page numbers"
