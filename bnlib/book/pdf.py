"""The rendered book as one PDF: ``python -m bnlib.book.pdf _build/html book.pdf``.

The articles of all pages are put into one page, in the order of the table of contents, with their
links turned to point inside it; Chromium prints that page with page numbers and bookmarks.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from playwright.sync_api import sync_playwright

__all__ = ["join_pages", "print_book"]

_FOOTER = (
    '<div style="font-size:9px;width:100%;text-align:center;color:#555">'
    '<span class="pageNumber"></span></div>'
)
_ARTICLE = re.compile(r'<article class="bd-article"[^>]*>(.*?)</article>', re.S)
_TYPESET = """async () => {
  for (const image of document.images) image.loading = "eager";
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
}"""


def join_pages(root: Path, names: list[str]) -> str:
    """The named pages of the book in ``root`` (paths without ``.html``) as one HTML page.

    It is to lie in the folder of the first page, whose head it has.  Identifiers get their page's
    name before them.  Raises :class:`ValueError` for a page without an article.
    """
    folder = (root / names[0]).parent
    ids = {(root / f"{name}.html").resolve(): f"page-{n}" for n, name in enumerate(names)}
    parts = []
    for name in names:
        path = (root / f"{name}.html").resolve()
        source = path.read_text(encoding="utf-8")
        found = _ARTICLE.search(source)
        if found is None:
            raise ValueError(f"{path} has no <article>; is it a page of the book?")
        mine = ids[path]

        def turn(match: re.Match[str], path: Path = path, mine: str = mine) -> str:
            address, _, anchor = match[1].partition("#")
            target = (path.parent / address).resolve() if address else path
            if target in ids:
                page = ids[target]
                return f'href="#{page}-{anchor}"' if anchor else f'href="#{page}"'
            return match[0]

        article = re.sub(r'\bhref="((?![a-z]+:)[^"]*)"', turn, found[1])
        article = re.sub(r"\burl\(#", f"url(#{mine}-", article)
        article = re.sub(
            r'\b(id|for|aria-labelledby|aria-describedby)="', rf"\g<0>{mine}-", article
        )
        article = re.sub(r"<script.*?</script>", "", article, flags=re.S)
        parts.append(f'<article class="bd-article" id="{mine}">{article}</article>')
    head = (folder / f"{Path(names[0]).name}.html").read_text(encoding="utf-8")
    head = head[: head.index("<body")]
    main = f'<div class="bd-article-container">{"".join(parts)}</div>'
    return f'{head}<body class="bn-print"><main class="bd-content">{main}</main></body></html>'


def print_book(root: Path, out: Path, names: list[str], browser: str) -> None:
    """Print the named pages of the book in ``root`` into the file ``out`` with a Chromium."""
    whole = root / Path(names[0]).parent / "whole-book.html"
    whole.write_text(join_pages(root, names), encoding="utf-8")
    try:
        with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(color_scheme="light")
            page.set_default_timeout(0)
            page.goto(whole.resolve().as_uri(), wait_until="load")
            page.evaluate(_TYPESET)
            made = Path(folder, "book.pdf")
            page.pdf(
                path=made,
                format="A4",
                margin={"top": "18mm", "bottom": "18mm", "left": "18mm", "right": "18mm"},
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=_FOOTER,
                print_background=True,
                outline=True,
                tagged=True,
            )
            chromium.close()
            shutil.move(made, out)
    finally:
        whole.unlink()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print the rendered book into one PDF.")
    parser.add_argument("root", type=Path, help="the folder of the rendered book")
    parser.add_argument("out", type=Path, help="the file to write")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("The PDF needs Chromium: install it, for example with `apt-get install chromium`.")
    toc = yaml.safe_load(Path("_toc.yml").read_text(encoding="utf-8"))
    names = [toc["root"], *(each["file"] for part in toc["parts"] for each in part["chapters"])]
    print_book(arguments.root, arguments.out, names, browser)
    print(f"The book is in {arguments.out}")


if __name__ == "__main__":
    main()
