"""Names in the cache: data and fine-tuned models stay valid as long as these do not change."""

from pathlib import Path

import pytest

from benchmarks.llm import finetune as llm
from benchmarks.text import finetune as text
from benchmarks.text import tasks as text_tasks
from benchmarks.vision import finetune as vision
from benchmarks.vision import tasks as vision_tasks
from benchmarks.vision.strength import strength


@pytest.fixture(autouse=True)
def nothing_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "prepare_task", vision_tasks.task_folder)
    monkeypatch.setattr(vision, "prepare_backbone", lambda: Path("pretrained-e7c322f1515a"))
    for suite in (text, llm):
        monkeypatch.setattr(suite, "prepare_task", text_tasks.task_folder)


def test_data_of_the_suites() -> None:
    assert [vision_tasks.task_folder(name).name for name in vision_tasks.SUITE] == [
        "mnist-8480dfb90d0c",
        "georgian-a441d020e922",
        "hangul-6bae7e2d00c8",
        "fashion-20f7374858bc",
        "hiragana-75621b5d168f",
        "thai-b28a5772cabb",
        "themes-9e37cfdd263a",
        "emoji-7df76f827ab3",
    ]
    assert [text_tasks.task_folder(name).name for name in text_tasks.SUITE] == [
        "newsgroups-f01633434785",
        "reviews-d7d4ffb181c2",
        "domains-7a191c6d8d45",
        "parts_of_speech-7a191c6d8d45",
        "topics-06bcbf1b2a55",
        "eras-e787081eb94a",
        "countries-0d186d3fb456",
        "molecules-be6d635cb950",
    ]


def test_encoders_of_images(cache: Path) -> None:
    folders = [
        vision.encoder_folder("mnist", 0, vision.FineTuning()),
        vision.encoder_folder("mnist", 1, vision.FineTuning()),
        vision.encoder_folder("thai", 0, strength("thai")),
    ]
    assert [str(folder.relative_to(cache)) for folder in folders] == [
        "encoders/seed0/mnist-5632a00986e9",
        "encoders/seed1/mnist-bfe40beb4444",
        "encoders/seed0/thai-52a3e219f0de",
    ]


def test_encoders_of_texts(cache: Path) -> None:
    folder = text.encoder_folder("newsgroups", 0, text.FineTuning())
    assert str(folder.relative_to(cache)) == "text-encoders/seed0/newsgroups-8599160749b9"


def test_language_models(cache: Path) -> None:
    folder = llm.TUNER.folder("reviews", 0, llm.FineTuning())
    assert str(folder.relative_to(cache)) == "llm/seed0/reviews-bd586dc98aa5"
