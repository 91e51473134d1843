"""What mkdocs does to the pages of docs/ before it renders them (mkdocs.yml, hooks).

Marks in a page are replaced by what the program says itself: `<!-- commands -->` by the help of every command, and
`<!-- configuration -->` by a table of every section. Links to files that are not part of the site become their text.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from certtrain.cli.main import build_parser
from certtrain.config.keys import choices_of, fields_of, sections_of, variants_of
from certtrain.config.reading import write_value
from certtrain.config.schema import Config
from certtrain.config.section import Section

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """mkdocs calls this for every page."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(ROOT / "docs")
        return link[0] if inside else f"`{link[1].strip('`')}`"

    markdown = LINK.sub(outside, markdown).replace("<!-- commands -->", "\n".join(commands()))
    return markdown.replace("<!-- configuration -->", "\n".join(configuration(Config, "")))


def commands() -> Iterator[str]:
    """A heading for each command, and what `certtrain COMMAND --help` prints."""
    os.environ["COLUMNS"] = "88"  # what fits beside the tables of contents
    (known,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in known.choices.items():
        yield f"\n## certtrain {name}\n\n```text\n{parser.format_help()}```"


def configuration(section: type[Section], path: str) -> Iterator[str]:
    """Headings and tables, in Markdown, of a section and of those in it."""
    fields = fields_of(section)
    single = {key: field for key, field in fields.items() if len(sections_of(field)) != 1}
    if single:
        yield from ["", "| key | default | meaning |", "|---|---|---|"]
    for key, field in single.items():
        default = "–" if field.is_required() else f"`{written(field.get_default(call_default_factory=True))}`"
        choices = ", ".join(f"`{word}`" for word in choices_of(field)) if field.annotation is not bool else ""
        meaning = (field.description or "").replace("|", "\\|") + (f" One of {choices}." if choices else "")
        yield f"| `{key}` | {default} | {meaning} |"
    for key, field in fields.items():
        name = f"{path}{key}"
        for word, inner in variants_of(field.annotation).items():
            yield from ["", f"### {name}: {word}", "", about(inner)]
            rest = {k: f for k, f in fields_of(inner).items() if k != "name"}
            if rest:
                yield from configuration(inner, f"{name}.")
        if len(sections_of(field)) == 1:
            (inner,) = sections_of(field)
            yield from ["", f"{'##' if not path else '####' if '.method.' in name else '###'} {name}", "", about(inner)]
            yield from configuration(inner, f"{name}.")


def written(default: Any) -> str:
    """A default as YAML; of a section, its name."""
    return default.name if isinstance(default, Section) else write_value(default)


def about(section: type[Section]) -> str:
    """Its docstring."""
    return inspect.getdoc(section) or ""
