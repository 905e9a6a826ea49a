"""Pages from jinja2's templates, which each room keeps in its folder ``templates``, and onto the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2

from nnunetv2_lightnets.files import write_atomically


def template(
    package: str, name: str, filters: Mapping[str, Callable[..., str]], escape: Callable[[str], str] | None = None
) -> jinja2.Template:
    """The template ``name`` of a package of ours; a page extends ``page.html.jinja``.

    Args:
        package: where its folder ``templates`` is.
        name: file name. In ``.tex`` templates ``<< >>`` surround what is filled in.
        filters: by the names that the template knows them by.
        escape: what the filter ``e`` does; None for HTML, in which everything is escaped.
    """
    braces_taken = name.endswith(".tex.jinja")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("nnunetv2_lightnets.pages")]),
        autoescape=escape is None,  # HTML; the other formats mark by hand what comes from the user
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        variable_start_string="<<" if braces_taken else "{{",
        variable_end_string=">>" if braces_taken else "}}",
    )
    environment.filters |= filters
    if escape is not None:
        environment.filters["e"] = lambda value: escape(str(value))
    return environment.get_template(name)


def write_files(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write texts, by file name, into a folder that is made if it is not there; returns the files in this order.

    Each is written whole or not at all. Older files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]
