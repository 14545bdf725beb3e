"""What the rendered pages have beyond Jupyter Book: a Sphinx extension, named in ``_config.yml``.

* Figures that are SVG stand in the page itself, so that their text can be selected and found, and
  the colors of :mod:`bnlib.book.style` become those of the style sheet, for the light and the dark
  page each.
* A chapter begins with the part of the paper that it treats, the verdicts on its claims, and how
  long it runs.
* A page says when its source was changed last, by git.
* Where ``BOOK_REPOSITORY`` names the repository on GitHub, as in ``owner/name``, the pages have
  buttons that open a chapter in Colab or Binder and the addresses that they have on GitHub Pages.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

from bnlib.book import style
from bnlib.book.claims import VERDICTS, gather, read_claims, verdict

__all__ = ["inline_svg", "setup"]

_ROOT = Path(__file__).parents[2]
_VARIABLES = {
    style.INK: "ink",
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.PURPLE: "purple",
    style.PINK: "pink",
    style.OCHRE: "ochre",
}


def inline_svg(source: str, alt: str) -> str:
    """An SVG file's content as an element of an HTML page.

    Identifiers get a prefix of their own, as a page has many figures, and style rules, which would
    apply to the whole page, become attributes of this element alone.
    """
    prefix = "f" + hashlib.sha256(source.encode()).hexdigest()[:8]
    source = source[source.index("<svg") :]
    source = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<title>.*?</title>", "", source, flags=re.S
    )
    rules = "; ".join(re.findall(r"<style[^>]*>\s*\*\s*\{(.*?)\}\s*</style>", source, re.S))
    source = re.sub(r"<style.*?</style>", "", source, flags=re.S)
    source = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", source)
    for color, name in _VARIABLES.items():
        source = re.sub(rf"(?<!,){color}\b", f"var(--bn-{name},{color})", source, flags=re.I)
    head, body = source.split(">", 1)
    head = re.sub(r'\s(version|role|aria-label|xmlns:xlink|style)="[^"]*"', "", head)
    head = re.sub(r'\s(width|height)="([\d.]+)pt"', _in_pixels, head)
    if " width=" not in head and (box := re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', head)):
        head += f' width="{box[1]}" height="{box[2]}"'
    head = head.replace(
        "<svg", f'<svg class="bn-figure" role="img" aria-label="{html.escape(alt)}"', 1
    )
    return f'{head} style="{rules.strip()}">{body}'.replace("xlink:href", "href")


def _in_pixels(match: re.Match[str]) -> str:
    return f' {match[1]}="{float(match[2]) * 4 / 3:.0f}"'


def _visit_image(translator: Any, node: nodes.image) -> None:
    path = Path(translator.builder.srcdir, node["uri"])
    if path.suffix != ".svg" or not path.is_file():
        type(translator).visit_image(translator, node)
        return
    translator.builder.images.pop(node["uri"], None)  # no file beside the page
    source = path.read_text(encoding="utf-8")
    translator.body.append(inline_svg(source, node.get("alt", "")))
    raise nodes.SkipNode


def _depart_image(translator: Any, node: nodes.image) -> None:
    type(translator).depart_image(translator, node)


def _begin_chapter(app: Sphinx, doctree: nodes.document) -> None:
    """Put a line on the paper, the verdicts and the run time below a chapter's title."""
    path = Path(app.env.doc2path(app.env.docname))
    title = next(doctree.findall(nodes.title), None)
    if path.suffix != ".ipynb" or title is None:
        return
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    parts = []
    if "paper" in metadata:
        parts.append(f"<span>In the paper: {html.escape(metadata['paper'])}</span>")
    found, ledger = gather([path]), read_claims()
    verdicts = {name: verdict(ledger[name], found) for name in found}
    if verdicts:
        dots = "".join(
            f'<a class="bn-dot" href="#claim-{name}" data-verdict="{verdicts[name]}" '
            f'title="{html.escape(ledger[name].claim)}" '
            f'aria-label="{verdicts[name]}: {html.escape(ledger[name].claim)}"></a>'
            for name in sorted(found, key=lambda name: VERDICTS.index(verdicts[name]))
        )
        count = Counter(verdicts.values())
        words = ", ".join(f"{count[each]} {each}" for each in VERDICTS if count[each])
        parts.append(f'<span>Claims: {words} <span class="bn-dots">{dots}</span></span>')
    if seconds := metadata.get("papermill", {}).get("duration"):
        parts.append(f"<span>Runs in {seconds:.0f} s</span>")
    if parts:
        line = nodes.raw("", f'<p class="bn-begin">{"".join(parts)}</p>', format="html")
        title.parent.insert(title.parent.index(title) + 1, line)


def _choose_scripts(app: Sphinx, config: Config) -> None:
    """Load one script on every page; Jupyter Book would load all that lie in ``_static``."""
    config.html_js_files = [("page.js", {"defer": "defer"})]


def _publish(app: Sphinx, config: Config) -> None:
    """Set what depends on where the book is published."""
    if not (repository := os.environ.get("BOOK_REPOSITORY")):
        return
    owner, _, name = repository.partition("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"BOOK_REPOSITORY is {repository!r}; it must be like 'owner/name'")
    config.html_baseurl = config.ogp_site_url = f"https://{owner}.github.io/{name}/"
    config.html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
    config.notfound_urls_prefix = f"/{name}/"
    config.sitemap_url_scheme = "{link}"


def _describe_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    if page == "search":
        app.add_js_file("search.js", loading_method="defer")
    if "body" in context:  # a fold is called by what is written on it
        context["body"] = context["body"].replace(' aria-label="Toggle hidden content"', "")
    command = ["git", "log", "-1", "--format=%cs", "--", f"{page}.ipynb", f"{page}.md"]
    try:
        log = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return
    if day := log.stdout.strip():
        context["last_updated"] = day


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_node(nodes.image, override=True, html=(_visit_image, _depart_image))
    app.connect("config-inited", _choose_scripts)
    app.connect("config-inited", _publish)
    if os.environ.get("BOOK_REPOSITORY"):
        app.setup_extension("sphinx_sitemap")
    app.connect("doctree-read", _begin_chapter)
    app.connect("html-page-context", _describe_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
