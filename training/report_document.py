"""A report as data, and its two forms: one HTML file with its pictures inside, or Markdown with a folder of PNGs."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_video.files import write_atomically

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { background: #f6f6f6; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } p.note { color: #555; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    name: str
    """File name without suffix, in Markdown."""
    description: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in order; plain strings are paragraphs."""

    title: str
    blocks: Sequence[str | Table | Picture]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: str
    sections: list[Section] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write as Markdown if the name ends in .md (pictures in a folder beside it), else as HTML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            folder = path.with_name(f"{path.stem}_files")
            folder.mkdir(exist_ok=True)
            for section in self.sections:
                for picture in (block for block in section.blocks if isinstance(block, Picture)):
                    write_atomically(folder / f"{picture.name}.png", picture.png)
            write_atomically(path, self.markdown(folder.name).encode())
        else:
            write_atomically(path, self.html().encode())

    def html(self) -> str:
        """One page that needs no other file."""
        parts = [f"<h1>{html.escape(self.title)}</h1>", f"<p>{html.escape(self.lead)}</p>"]
        for section in self.sections:
            parts.append(f"<h2>{html.escape(section.title)}</h2>")
            parts += [_html(block) for block in section.blocks]
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
        )

    def markdown(self, folder: str) -> str:
        """The same as Markdown, with its pictures in `folder`."""
        parts = [f"# {self.title}", self.lead]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += [_markdown(block, folder) for block in section.blocks]
        return "\n\n".join(parts) + "\n"


def _html(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return f'<p class="note">{html.escape(block)}</p>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        return f'<p><img alt="{html.escape(block.description)}" src="data:image/png;base64,{data}"></p>'
    header = "".join(f"<th>{html.escape(name)}</th>" for name in block.header)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(text: str) -> str:
    kind = ' class="number"' if text[:1].isdigit() else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _markdown(block: str | Table | Picture, folder: str) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Picture):
        return f"![{block.description}]({folder}/{block.name}.png)"
    lines = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
