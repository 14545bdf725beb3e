"""The bibliography: each work can be found by its reader, and leads back to where it is cited."""

import json
import re
from pathlib import Path

import pytest
from pybtex.database import parse_file
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html" / "chapters"
WORKS = parse_file(str(ROOT / "references.bib")).entries
ADDRESSES = {
    "doi": r"10\.\d{4,9}/\S+",
    "eprint": r"(0[7-9]|1[0-4])\d\d\.\d{4}|(1[5-9]|[2-9]\d)\d\d\.\d{5}",  # a digit more since 2015
    "url": r"https://[\w-]+(\.[\w-]+)+/\S+",
}


def addresses(fields):
    return {name: fields[name] for name in ADDRESSES if name in fields}


def prose(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return "\n".join("".join(cell["source"]) for cell in cells)


def cited():
    pages = [*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("chapters/*.md")]
    roles = (re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(page)) for page in pages)
    return {key.strip() for page in roles for role in page for key in role.split(",")}


@pytest.mark.parametrize("key", WORKS)
def test_a_work_has_one_address_and_it_has_the_right_form(key):
    found = addresses(WORKS[key].fields)
    assert len(found) == 1, "two addresses would be two links"
    ((name, address),) = found.items()
    assert re.fullmatch(ADDRESSES[name], address)
    assert name != "eprint" or WORKS[key].fields.get("archiveprefix") == "arXiv"


def test_every_work_is_cited_and_every_cited_work_is_in_the_list():
    assert cited() == set(WORKS)


def works_on(page):
    """The works that a rendered bibliography lists: (anchor, what it says, where it is cited)."""
    return re.findall(
        r'<div class="citation" id="([^"]+)".*?<p>(.*?)</p>\s*<p class="bn-cited">(.*?)</p>',
        page.read_text(encoding="utf-8"),
        re.S,
    )


def check_links(page):
    works = works_on(page)
    for anchor, says, cited_in in works:
        assert says.count("<a ") == 1, f"not one link: {says}"
        assert re.search(r'<a [^>]*href="https://[^"]+">[^<]+</a>\.$', says), f"at the end: {says}"
        back = re.findall(r'href="([^"#]+)#([^"]+)"', cited_in)
        assert back, f"cited nowhere: {says}"
        for address, place in back:
            source = (page.parent / address).read_text(encoding="utf-8")
            span = re.search(rf'<span class="bibtex-citation" id="{place}">.*?</span>', source)
            assert span, f"{address} has no citation {place}"
            assert f'{page.name}#{anchor}"' in span[0], f"{address}#{place} cites another work"
    return works


@pytest.mark.skipif(
    not (HTML.parent / ".rendered").exists(), reason="the book is not built: run `make book` first"
)
def test_in_the_book_every_work_has_one_link_and_links_back_to_its_citations():
    assert len(check_links(HTML / "bibliography.html")) == len(WORKS)


def test_a_work_names_the_chapters_by_number_then_other_pages_by_title(tmp_path):
    (tmp_path / "w.bib").write_text(
        "@article{a, author={A, B}, title={T}, journal={J}, year=2000, doi={10.1000/1}}\n"
        "@article{c, author={C, D}, title={U}, journal={J}, year=2001, eprint={2001.00001}}\n"
    )
    pages = {
        "index": "Start\n=====\n\n:cite:`a`\n\n.. toctree::\n   :numbered:\n\n   z\n   b\n\n"
        ".. toctree::\n\n   list\n",
        "z": "First\n=====\n\n:cite:`c` :cite:`a` :cite:`a`\n",
        "b": "Second\n======\n\n:cite:`c,a`\n",
        "list": "Works\n=====\n\n.. bibliography::\n",
    }
    for name, text in pages.items():
        (tmp_path / f"{name}.rst").write_text(text)
    settings = {
        "extensions": ["sphinxcontrib.bibtex", "bnlib.book.links"],
        "bibtex_bibfiles": ["w.bib"],
        "html_theme": "basic",
    }
    out = tmp_path / "html"
    Sphinx(tmp_path, None, out, out / "trees", "html", settings, status=None).build()
    works = check_links(out / "list.html")
    names = [re.findall(r">([^<]+)</a>", cited_in) for *_, cited_in in works]
    assert names == [["1", "2", "Start"], ["1", "2"]]
    assert 'title="Second"' in works[1][2]
