"""Links that the text does not spell out: a Sphinx extension, named in ``_config.yml``.

* Below each work in the bibliography stand the chapters and pages that cite it.
* A name of this package in the text leads to its place in the reference.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

__all__ = ["setup"]


def _cited_in(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Below each work in the bibliography, link to its first citation in every chapter and page."""
    domain: Any = app.env.get_domain("cite")
    keys = {
        work.citation_id: work.key
        for work in domain.citations
        if work.bibliography_key.docname == docname
    }
    for work in doctree.findall(nodes.citation):
        places: dict[str, tuple[tuple[float, ...], str]] = {}
        for each in domain.citation_refs:
            if keys.get(work["ids"][0]) in {target.key for target in each.targets}:
                sections: Any = app.env.toc_secnumbers.get(each.docname, {})
                number = sections.get("", (math.inf,))
                places.setdefault(each.docname, (number, each.citation_ref_id))
        line = nodes.paragraph("", "Cited in: ", classes=["bn-cited"])
        for page, (number, place) in sorted(places.items(), key=lambda item: item[1][0]):
            title = app.env.titles[page].astext()
            name = title if math.inf in number else ".".join(map(str, number))
            if len(line) > 1:
                line += nodes.Text(", ")
            line += make_refnode(app.builder, docname, page, place, nodes.Text(name), title)
        if places:
            work += line


def _name_places(app: Sphinx) -> dict[str, Any]:
    """Where names are documented: by their full name, and by the last part if it cannot be a word.

    A last part that two objects share is left out.
    """
    domain: Any = app.env.get_domain("py")
    short = Counter(name.rpartition(".")[2] for name in domain.objects)
    places = dict(domain.objects)
    for name, place in domain.objects.items():
        last = name.rpartition(".")[2]
        if short[last] == 1 and ("_" in last or last != last.lower()):
            places[last] = place
    return places


def _link_names(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    places = _name_places(app)
    for literal in list(doctree.findall(nodes.literal)):
        place = places.get(literal.astext().removesuffix("()"))
        inside = literal.parent
        while inside is not None and not isinstance(inside, (nodes.reference, nodes.title)):
            inside = inside.parent
        if place is None or place.docname == docname or inside is not None:
            continue
        link = make_refnode(
            app.builder, docname, place.docname, place.node_id, literal.deepcopy(), literal.astext()
        )
        literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("doctree-resolved", _cited_in)
    app.connect("doctree-resolved", _link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
