"""How strongly the suite's encoders are fine-tuned, by task: see `benchmarks/notes`.

The merging literature's regime is good individual models and a poor pretrained one. Tasks whose
classes vary much need more images and epochs for that than digits do.
"""

from __future__ import annotations

from benchmarks.vision.finetune import FineTuning

USUAL = FineTuning(images=1600, epochs=2)
BY_TASK: dict[str, FineTuning] = {
    "georgian": FineTuning(images=1600, epochs=3),
    "hiragana": FineTuning(images=3000, epochs=3),
    "fashion": FineTuning(images=3000, epochs=3),
    "thai": FineTuning(images=3000, epochs=4),
    "themes": FineTuning(images=3000, epochs=4),
    "emoji": FineTuning(images=3000, epochs=4),
    "icon_sets": FineTuning(images=3000, epochs=3),
    "khmer": FineTuning(images=1600, epochs=3),
    "telugu": FineTuning(images=1600, epochs=3),
}


def strength(task: str) -> FineTuning:
    """The suite's settings for a task."""
    return BY_TASK.get(task, USUAL)
