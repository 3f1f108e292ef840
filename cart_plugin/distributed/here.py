"""One worker: this process."""

from __future__ import annotations

from collections.abc import Sequence

from cart_plugin.checkpoints.files import explain
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.part import Workshop
from cart_plugin.distributed.plan import Part
from cart_plugin.distributed.tasks import failures_of_mergekit
from cart_plugin.errors import CartError


def make(places: Places, parts: Sequence[Part]) -> None:
    """Make all parts, one after the other.

    Raises:
        CartError: one cannot be made; those before it are finished.
    """
    workshop = Workshop(places.folder)
    for number, part in enumerate(parts):
        try:
            with failures_of_mergekit():
                workshop.make(number)
        except OSError as error:
            raise CartError(f"cannot write {part.name}: {explain(error)}") from error
