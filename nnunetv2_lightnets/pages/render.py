"""Templates of pages, by jinja2; each room keeps its own in its folder ``templates``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jinja2


def template(
    package: str, name: str, filters: Mapping[str, Callable[..., str]], escape: Callable[[str], str] | None = None
) -> jinja2.Template:
    """The template ``name`` of a package of ours; it may include the style sheet ``style.css``.

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
