"""Pages as blocks, and how blocks become HTML and Markdown.

Text is Markdown of the simplest kind in both: `code`, **bold** and [links](of.html).
"""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 76rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; border-bottom: 2px solid #d0d7de; padding-bottom: .25rem; }
h3 { margin-top: 2rem; }
p, li { max-width: 52rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
a { color: #0b5394; }
code { font-size: .875em; background: #f1f3f5; padding: .1em .3em; border-radius: 3px;
  overflow-wrap: anywhere; }
pre { background: #f1f3f5; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8125rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e1e4e8; }
th { border-bottom: 2px solid #8c959f; vertical-align: bottom; }
th.number, td.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
tr.first td { border-top: 2px solid #b6bdc5; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #57606a; }
details { margin: 1rem 0; }
@media (max-width: 48rem) {
  figure { overflow-x: auto; }
  img { max-width: none; width: 48rem; }
}
summary { cursor: pointer; font-weight: 600; }
.missing { border-left: 4px solid #e69f00; padding: .25rem 1rem; background: #fff8e8; }
"""
SHORT = 32  # characters of a cell that is not broken into lines
# The page asks nothing of any other place.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; those of level 2 are in the page's list of contents."""

    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        """What a link to it is called."""
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Text; as a notice it says what is missing."""

    text: str
    is_notice: bool = False


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of texts."""

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of texts.

    Args:
        num_words: leading columns that hold words; the others hold numbers.
        breaks: rows above which a line is drawn.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int = 1
    breaks: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that the page holds itself."""

    name: str  # of its file, without the ending
    svg: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Paragraph | Bullets | Grid | Picture | Details


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """Return a page that needs no other file and no script."""
    headings = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = " ".join(f'<a href="#{h.anchor}">{html.escape(h.text)}</a>' for h in headings)
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def as_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """Return the page in Markdown; `pictures` is the folder of the picture files."""
    return f"# {title}\n\n" + markdown_of(blocks, pictures)


def markdown_of(blocks: Sequence[Block], pictures: str = "") -> str:
    """Return blocks in Markdown."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def pictures_in(blocks: Sequence[Block]) -> list[Picture]:
    """Return all pictures, in order."""
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Details):
            found += pictures_in(block.blocks)
    return found


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        level = block.level
        anchor = f' id="{block.anchor}"' if level == 2 else ""
        return f"<h{level}{anchor}>{_inline(block.text)}</h{level}>"
    if isinstance(block, Paragraph):
        kind = ' class="missing"' if block.is_notice else ""
        return f"<p{kind}>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in block.texts) + "</ul>"
    if isinstance(block, Grid):
        return _html_grid(block)
    if isinstance(block, Picture):
        data = base64.b64encode(block.svg).decode()
        caption = html.escape(block.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    inner = "\n".join(_html(one) for one in block.blocks)
    return f"<details><summary>{_inline(block.summary)}</summary>\n{inner}\n</details>"


def _html_grid(grid: Grid) -> str:
    def kind(index: int, text: str, tag: str) -> str:
        if index >= grid.num_words:
            return ' class="number"'
        return ' class="short"' if tag == "td" and len(text) <= SHORT else ""

    def cells(texts: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{kind(index, text, tag)}>{_inline(text)}</{tag}>"
            for index, text in enumerate(texts)
        )

    opened = [' class="first"' if index in grid.breaks else "" for index in range(len(grid.rows))]
    pairs = zip(opened, grid.rows, strict=True)
    lines = [f"<tr{kind}>{cells(row, 'td')}</tr>" for kind, row in pairs]
    head = f"<thead><tr>{cells(grid.headings, 'th')}</tr></thead>"
    return (
        f'<div class="table"><table>{head}<tbody>\n' + "\n".join(lines) + "</tbody></table></div>"
    )


def _inline(text: str) -> str:
    safe = html.escape(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', safe)


def _markdown(block: Block, pictures: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return f"> {block.text}" if block.is_notice else block.text
    if isinstance(block, Bullets):
        return "\n".join(f"- {text}" for text in block.texts)
    if isinstance(block, Grid):
        rule = ["---" if i < block.num_words else "---:" for i in range(len(block.headings))]
        rows = [[text.replace("|", "\\|") for text in row] for row in block.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in (block.headings, rule, *rows))
    if isinstance(block, Picture):
        return f"![{block.caption}]({pictures}/{block.name}.svg)"
    inner = markdown_of(block.blocks, pictures)
    return f"<details><summary>{block.summary}</summary>\n\n{inner}\n</details>"
