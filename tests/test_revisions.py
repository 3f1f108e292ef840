"""What is measured stays valid while a room's REVISION does: then its numbers must not move."""

from __future__ import annotations

import pytest

from cart_plugin.checkpoints.files import read_json
from tests.revisions import FILE, ROOMS


@pytest.mark.parametrize("name", ROOMS)
def test_numbers_move_with_the_revision_only(name: str) -> None:
    room, figures = ROOMS[name]
    known = read_json(FILE)[name]
    after = "run `python -m tests.revisions`, and measure again what rests on it"
    assert known["revision"] == room.REVISION, f"cart_plugin.{name}.REVISION was raised: {after}"
    assert figures() == pytest.approx(known["figures"], rel=2e-4), (
        f"the numbers of cart_plugin.{name} have changed: raise its REVISION, then {after}"
    )
