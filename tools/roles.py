"""Roles of docstrings, :func:`verify` say, as links of the site; a hook of mkdocs.

The one idea: mkdocstrings takes a docstring for Markdown, to which a role is a colon and a word, and the
`::` before a block is text. A name that has a place on a page is linked to it, any other is code.
"""

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|math):<code>~?([^<]*)</code>")
PLACE = re.compile(r'<h\d id="(snn_reversible_plugin\.[\w.]*?(\w+))"')


def shown(html: str, known: dict[str, str]) -> str:
    """A page with its roles as code, linked where the name is known: ``{"verify": "a.verify"}``.

    Example:
        >>> shown(":func:<code>~b.verify</code>, :mod:<code>.b</code>", {"verify": "a.verify"})
        '<autoref optional identifier="a.verify"><code>verify</code></autoref>, <code>b</code>'
    """

    def replaced(role: re.Match[str]) -> str:
        name = role[1] if role[0].startswith(":math:") else role[1].rpartition(".")[2]
        if name not in known:
            return f"<code>{name}</code>"
        return f'<autoref optional identifier="{known[name]}"><code>{name}</code></autoref>'

    return ROLE.sub(replaced, html).replace("::</p>", ":</p>")


def on_env(env: Any, config: Any, files: Any) -> None:
    """Called by mkdocs when all pages are there, and before autorefs resolves links."""
    pages = [file.page for file in files.documentation_pages() if file.page and file.page.content]
    known = {name: place for page in pages for place, name in PLACE.findall(page.content)}
    for page in pages:
        page.content = shown(page.content, known)
