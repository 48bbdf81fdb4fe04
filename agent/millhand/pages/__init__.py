"""Pages for people: one file each, readable on a phone, in light and dark, without network or script."""

from __future__ import annotations

from typing import Any


def render(package: str, template: str, **values: Any) -> str:
    """Fill in a template that lies in a package and extends `page.html.j2` of this one."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader(__name__, ".")]),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)
