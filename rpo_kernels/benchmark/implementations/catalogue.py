"""Lookup of implementations by what they start from and by name; importing it registers all of them."""

from collections.abc import Sequence

from . import ours, peers, plain  # noqa: F401  (they register)
from .registry import REGISTRY, Implementation


def find(source: str, names: Sequence[str] | None = None) -> list[Implementation]:
    """Implementations that start from a source, all or those whose name contains one of `names`.

    Raises:
        ValueError: if no implementation is so named.
    """
    for name in names or []:
        if not any(name.lower() in one.name.lower() for one in REGISTRY):
            known = sorted({one.name for one in REGISTRY})
            raise ValueError(f"an implementation must be part of one of the names {', '.join(known)}; got {name!r}")
    found = [one for one in REGISTRY if one.source == source]
    return [one for one in found if not names or any(name.lower() in one.name.lower() for name in names)]


def find_one(source: str, name: str) -> Implementation:
    """The implementation that starts from a source, with this very name."""
    (one,) = (one for one in REGISTRY if one.source == source and one.name == name)
    return one
