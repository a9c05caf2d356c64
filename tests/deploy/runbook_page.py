"""The runbook as the twin serves it, so that an alert's link leads somewhere on every installation.

PYTHONPATH=tests python -m deploy.runbook_page > kavier_twin/serve/static/runbook.html
"""

from __future__ import annotations

import re
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from deploy.helm_chart import ROOT

RUNBOOK = ROOT / "docs/runbook.md"
PAGE = ROOT / "kavier_twin/serve/static/runbook.html"
_HEAD = """<!doctype html>
<!-- Made from docs/runbook.md: see tests/deploy/runbook_page.py; a test keeps it up to date. -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Kavier Twin: runbook</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css">
<link rel="stylesheet" href="runbook.css">
</head>
<body>
<p><a href="../">The twin</a></p>
"""


def anchor(heading: str) -> str:
    """As GitHub names a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def page() -> str:
    """The whole page. Links to other pages of the documentation, which the twin does not serve, become their names."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(RUNBOOK.read_text())
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(following.content))
        if token.type == "inline":
            token.children = _unlinked(token.children or [])
    return f"{_HEAD}{markdown.renderer.render(tokens, markdown.options, {})}</body>\n</html>\n"


def _unlinked(tokens: list[Token]) -> list[Token]:
    kept, beside = [], False
    for token in tokens:
        if token.type == "link_open" and not str(token.attrGet("href")).startswith(("#", "http")):
            beside = True
        elif token.type == "link_close" and beside:
            beside = False
        else:
            kept.append(token)
    return kept


if __name__ == "__main__":
    print(page(), end="")
