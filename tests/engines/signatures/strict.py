"""Fakes with exactly the recorded signatures: what is not there is an error, as in life."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tests.engines.signatures.record import load


def recorded(engine: str, kind: str, name: str) -> Any:
    """What is recorded of a name, in whatever file of the package it is."""
    for entry in load(engine)["files"].values():
        if name in entry.get(kind, {}):
            return entry[kind][name]
    raise LookupError(f"{kind} {name} of {engine} are not recorded")


def bind(engine: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as a call of the recorded function binds them. Raises ``TypeError``."""
    given = recorded(engine, "functions", name)
    names = [one for one in given["positional"] if one not in ("self", "cls")]
    any_keyword = any(one.startswith("**") for one in given["keyword"])
    if len(args) > len(names):
        raise TypeError(f"{name} takes {len(names)} positional arguments, {len(args)} were given")
    bound = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        if key in bound:
            raise TypeError(f"{name} got two values for {key}")
        if key not in names and key not in given["keyword"] and not any_keyword:
            raise TypeError(f"{name} got an unexpected keyword argument {key}")
        bound[key] = value
    return bound


def fields(engine: str, *classes: str) -> list[str]:
    """The public fields of classes, in order."""
    found = [name for one in classes for name in recorded(engine, "classes", one)]
    return [name for name in found if not name.startswith("_")]


def record_class(name: str, names: list[str], **defaults: Any) -> type:
    """A class with these fields and no others, neither to make nor to read; None by default."""

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807 - becomes a method
        unknown = given.keys() - set(names)
        if unknown:
            raise TypeError(f"{name} got unexpected keyword arguments {sorted(unknown)}")
        for field in names:
            value = given.get(field, defaults.get(field))
            object.__setattr__(self, field, value)

    return type(name, (), {"__slots__": tuple(names), "__init__": __init__})


@contextmanager
def installed(**modules: ModuleType) -> Iterator[None]:
    """Makes modules importable for a while; ``a__b`` stands for ``a.b``."""
    names = {name.replace("__", "."): module for name, module in modules.items()}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
