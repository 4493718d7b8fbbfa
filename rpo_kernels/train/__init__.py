"""The minimal trainer: from preference data to a trained model. Its names are imported when the first is used."""

from typing import TYPE_CHECKING, Any

from .._lazy import attribute

if TYPE_CHECKING:
    from ._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return attribute(__name__, name)
