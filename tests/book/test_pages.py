"""What the build adds to the pages: figures in the page itself, a line below a chapter's title."""

import io
import json
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from docutils.core import publish_doctree

from bnlib.book import style
from bnlib.book.claims import MIME, read_claims
from bnlib.book.links import _name_places
from bnlib.book.pages import _begin_chapter, _publish, inline_svg


def svg_of_a_figure():
    with mpl.rc_context():
        style.use()
        fig, ax = plt.subplots()
        ax.plot([0, 1], color=style.BLUE)
        ax.set_xlabel("steps until m < 2")
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg")
        plt.close(fig)
    return buffer.getvalue()


def test_a_figure_in_the_page_is_well_formed_named_and_has_text_that_is_text():
    page = inline_svg(svg_of_a_figure(), 'A "line" & more')
    root = ET.fromstring(page)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'A "line" & more'
    texts = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("text")]
    assert "steps until m < 2" in texts
    width, height = float(root.get("width")), float(root.get("height"))
    assert abs(width / height - 4.8 / 3.2) < 0.01


def test_the_palette_becomes_the_style_sheets_and_nothing_else_of_the_page_is_touched():
    page = inline_svg(svg_of_a_figure(), "")
    for color, name in ((style.BLUE, "blue"), (style.INK, "ink")):
        assert f"var(--bn-{name},{color})" in page
        assert color not in page.replace(f"var(--bn-{name},{color})", "")
    assert "<style" not in page
    assert "stroke-linejoin" in page.split(">", 1)[0]


def test_identifiers_of_two_figures_do_not_meet_and_those_within_one_still_lead_somewhere():
    one = inline_svg(svg_of_a_figure(), "")
    other = inline_svg(svg_of_a_figure().replace("steps", "Steps"), "")
    ids = [set(re.findall(r'\bid="([^"]+)"', page)) for page in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used
    assert used <= ids[0]


def test_a_drawings_own_variables_are_left_as_they_are():
    drawing = f'<svg viewBox="0 0 1 1"><path style="fill:var(--bn-ink,{style.INK})"/></svg>'
    page = inline_svg(drawing, "")
    assert page.count("var(") == 1
    assert ET.fromstring(page).get("width") == "1", "its natural size"


class Application:
    """As much of Sphinx as the line below the title needs."""

    def __init__(self, path):
        self.env = self
        self.docname = path.stem
        self.doc2path = lambda _: str(path)


def test_a_chapter_begins_with_the_papers_section_the_verdicts_and_the_run_time(tmp_path):
    name = next(each.id for each in read_claims().values() if each.interval == "exact")
    value = float(read_claims()[name].predicate.split()[1])
    data = {MIME: {"id": name, "measured": value, "low": value, "high": value, "note": ""}}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "source": "", "metadata": {}, "outputs": [output]}
    metadata = {"paper": "section 3", "papermill": {"duration": 12.3}}
    path = tmp_path / "04_bn_transform.ipynb"
    path.write_text(json.dumps({"metadata": metadata, "cells": [cell]}))
    doctree = publish_doctree("Title\n=====\n\nText.", settings_overrides={"doctitle_xform": False})
    _begin_chapter(Application(path), doctree)
    page = doctree.pformat()
    for words in ("section 3", f"#claim-{name}", "Runs in 12 s"):
        assert words in page
    assert page.index("Title") < page.index("bn-begin") < page.index("Text.")


def test_a_repository_gives_the_pages_their_addresses_and_buttons(monkeypatch):
    def configured(repository):
        config = SimpleNamespace(html_theme_options={})
        monkeypatch.setenv("BOOK_REPOSITORY", repository)
        _publish(None, config)
        return config

    assert vars(configured("")) == {"html_theme_options": {}}
    config = configured("someone/bn.book")
    assert config.html_baseurl == "https://someone.github.io/bn.book/"
    assert config.notfound_urls_prefix == "/bn.book/"
    assert config.html_theme_options["repository_url"] == "https://github.com/someone/bn.book"
    with pytest.raises(ValueError, match=r"https://x\.y.*'owner/name'"):
        configured("https://x.y")


def test_only_names_that_cannot_be_words_are_linked_by_their_last_part():
    objects = dict.fromkeys(
        [
            "bnlib.read",
            "bnlib.batch_norm",
            "bnlib.BatchNorm",
            "bnlib.a.twice_so",
            "bnlib.b.twice_so",
        ]
    )
    domain = SimpleNamespace(objects=objects)
    app = SimpleNamespace(env=SimpleNamespace(get_domain=lambda _: domain))
    assert set(_name_places(app)) == {*objects, "batch_norm", "BatchNorm"}
