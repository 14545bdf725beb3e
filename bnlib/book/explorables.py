"""Panels that a reader can move: scripts of ``_static/explorables``, with data from a cell."""

from __future__ import annotations

import html
import json
from typing import Any

from IPython.display import HTML

__all__ = ["explorable"]


def explorable(name: str, label: str, invitation: str, **data: Any) -> HTML:
    """The panel that ``_static/explorables/<name>.js`` draws, with the shared frame around it.

    ``label`` names it for those who do not see it, ``invitation`` says in a sentence what to try,
    and ``data`` (what JSON can hold) travel in the page.  Without scripts the invitation gives way
    to a remark that the figures of the chapter show the same.
    """
    scripts = "".join(
        f'<script src="../_static/explorables/{each}.js" defer></script>'
        for each in ("frame", name)
    )
    numbers = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return HTML(
        f'<div class="bn-explorable" data-explorable="{name}" role="group" '
        f'aria-label="{html.escape(label)}"><p><strong>Try it.</strong> {invitation}</p>'
        f'<script type="application/json">{numbers}</script><noscript><p>This panel needs scripts; '
        f"the figures of its chapter show what it shows.</p></noscript></div>{scripts}"
    )
