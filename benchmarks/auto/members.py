"""Which models of a suite are merged together, by how many they are, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks.suites import Encoders, task_order

OVERLAPPING = "overlapping"

Member = tuple[int, str]  # a model: how far its seed is from the first one's, and its task
Sets = Mapping[str, Sequence[tuple[Member, ...]]]


def sets_of(suite: str) -> dict[str, list[tuple[str, ...]]]:
    """Which tasks are merged, by how many they are: neighbours in the suite's order."""
    order = task_order(suite)
    pairs = [order[start : start + 2] for start in (0, 2, 4, 6)]
    triples = [order[start : start + 3] for start in (0, 3)]
    return {"2": pairs, "3": triples} | {str(count): [order[:count]] for count in (4, 6, 8)}


def members_of(suite: str) -> dict[str, list[tuple[Member, ...]]]:
    """Which models are merged, by how many they are; three experts that overlap at the end.

    Those are two of one task, fine-tuned on other samples of its data (and, of images, under other
    heads), beside one of another task.
    """
    sets = {
        count: [tuple((0, task) for task in tasks) for tasks in chosen]
        for count, chosen in sets_of(suite).items()
    }
    order = task_order(suite)
    pairs = zip(order[::2], order[1::2], strict=True)
    return sets | {OVERLAPPING: [((0, one), (1, one), (0, other)) for one, other in pairs]}


def needed(suite: str, sets: Sets) -> list[list[str]]:
    """The tasks of which models are merged, of the first seed, the next one, and so on."""
    members = {one for chosen in sets.values() for members in chosen for one in members}
    return [
        [task for task in task_order(suite) if (offset, task) in members]
        for offset in range(1 + max(offset for offset, _ in members))
    ]


def judge(
    held: Sequence[Encoders], tensors: Mapping[str, Tensor], members: Sequence[Member]
) -> dict[Member, float]:
    """The accuracy of tensors for each member's task, under that member's head.

    Args:
        held: encoders of the first seed, the next one, and so on.
        tensors: of a merged model.
        members: that it was merged of.
    """
    found: dict[Member, float] = {}
    for offset, encoders in enumerate(held):
        own = [task for seeds_on, task in members if seeds_on == offset]
        if own:
            found |= {(offset, task): one for task, one in encoders.judge(tensors, own).items()}
    return found


def by_name(found: Mapping[Member, float], members: Sequence[Member]) -> dict[str, float]:
    """Accuracies as records have them."""
    return {f"{task} {offset}": found[offset, task] for offset, task in members}


def heading(count: str) -> str:
    """Of a column of a table."""
    return "3, overlapping" if count == OVERLAPPING else count
