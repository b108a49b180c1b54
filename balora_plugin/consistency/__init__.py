"""The forms of the consistency term, one file each, which holds it three times side by side: dense, in place, top K.

A new form is one new file here that ends in `FORM = Form(...)`; its name is the file's. Importing this package imports
neither a form nor torch; a file whose name begins with an underscore is no form.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._form import Form

_FIRST = ("kl", "reverse_kl", "jsd", "mse")  # in the order in which messages name them


def _names() -> tuple[str, ...]:
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return (*(name for name in _FIRST if name in found), *sorted(found.difference(_FIRST)))


NAMES = _names()


def form_named(name: str) -> Form:
    """The form of that name, one of `NAMES`; imports its file."""
    form: Form = import_module(f".{name}", __name__).FORM
    return form


def all_forms() -> dict[str, Form]:
    """{name: form} of all, in the order of `NAMES`. To be called where a module is imported: no graph can import."""
    return {name: form_named(name) for name in NAMES}
