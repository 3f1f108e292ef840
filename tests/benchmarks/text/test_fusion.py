"""The text suite's rows through FusionBench: pools of tiny encoders, AdaMerging, and tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

pytest.importorskip("fusion_bench")

from benchmarks.common.beside import BESIDE_MERGEKIT, WEIGHTS, slug
from benchmarks.common.data_free import factored, tsvm
from benchmarks.common.heads import Head
from benchmarks.text import fusion
from benchmarks.text.adaptation import TextAdaMerging, TextCartAdaMerging
from benchmarks.text.encoder import features, load_encoder
from benchmarks.text.suite import IN_MEMORY
from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.algorithm import CartAlgorithm
from tests.fusion_bench.pools import save_tokenizer

TASKS = ("one", "two", "three")
QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = [f"word{number}" for number in range(2, 64)]


def encoder(seed: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * bool(seed)
    return model.eval()


def texts(task: str, split: str, count: int) -> list[str]:
    assert split == "validation"
    start = TASKS.index(task)
    return [" ".join(WORDS[start + at % 9 : start + at % 9 + 6]) for at in range(min(count, 24))]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pool's config for three tiny encoders, their base and heads."""
    folders = {}
    for seed, task in enumerate(("base", *TASKS)):
        folders[task] = tmp_path / "models" / task
        encoder(seed).save_pretrained(folders[task])
        head = tmp_path / "heads" / task
        head.mkdir(parents=True)
        weight = 2 * torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        Head(weight, torch.zeros(3)).save(head)
    save_tokenizer(folders["base"])
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folders["base"])
    monkeypatch.setattr(fusion, "task_head_folder", lambda task, _: tmp_path / "heads" / task)
    monkeypatch.setattr(fusion, "texts", texts)
    base = folders.pop("base")
    return fusion.pool(folders, base)


def pool(config: dict[str, Any]) -> Any:
    from fusion_bench.utils import instantiate
    from omegaconf import OmegaConf

    plain = {name: value for name, value in config.items() if name != "heads"}
    return instantiate(OmegaConf.create(plain))


def adapting(config: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "heads": config["heads"],
        "max_steps": steps,
        "batch_size": 8,
        "lr": 0.05,
        "merging_weights_save_path": None,
    }


def entropy(model: nn.Module, config: dict[str, Any]) -> float:
    tokenizer = pool(config).load_tokenizer()
    total = 0.0
    with torch.no_grad():
        for task in TASKS:
            head = Head.load(Path(config["heads"][task]))
            logits = head(features(model, tokenizer, texts(task, "validation", 24)))
            total += torch.distributions.Categorical(logits=logits).entropy().mean().item()
    return total


def test_adamerging_starts_from_task_arithmetic_and_gets_surer(config: dict[str, Any]) -> None:
    start = TextAdaMerging(**adapting(config, 0)).run(pool(config))
    base = encoder(0).state_dict()[QUERY]
    taus = [encoder(seed).state_dict()[QUERY] - base for seed in (1, 2, 3)]
    assert torch.allclose(start.state_dict()[QUERY], base + 0.3 * sum(taus), atol=1e-6)
    adapted = TextAdaMerging(**adapting(config, 12)).run(pool(config))
    assert entropy(adapted, config) < entropy(start, config) - 0.05


def test_no_run_goes_on_from_one_that_started_elsewhere(
    config: dict[str, Any], tmp_path: Path
) -> None:
    settings = adapting(config, 1) | {"checkpoint_path": str(tmp_path / "state.pt")}
    TextAdaMerging(init_values=0.3, **settings, checkpoint_every=1).run(pool(config))
    with pytest.raises(CartError, match="init_values"):
        TextAdaMerging(init_values=0.4, **settings).run(pool(config))


def test_cart_and_adamerging_start_from_cart(config: dict[str, Any]) -> None:
    settings = {"rank": 3, "scaling_factor": 2.0}
    start = TextCartAdaMerging(**settings, **adapting(config, 0)).run(pool(config))
    cart = CartAlgorithm(**settings).run(pool(config)).state_dict()
    assert all(
        torch.allclose(tensor, cart[name], atol=1e-5) for name, tensor in start.state_dict().items()
    )


def test_batches_go_round_over_all_texts(config: dict[str, Any]) -> None:
    algorithm = TextAdaMerging(**adapting(config, 1))
    algorithm.prepare_inputs(pool(config))
    batches = algorithm.batches("one")
    seen = [text for _ in range(3) for text in next(batches)]
    assert sorted(seen) == sorted(texts("one", "validation", 24))
    again = algorithm.batches("one")
    assert next(again) == seen[:8]


def test_settings_are_chosen_on_validation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def merged(key: str, point: dict[str, Any], *_: Any) -> Path:
        made.append(point)
        place = tmp_path / f"{key}-{len(made)}"
        place.mkdir()
        scale = point.get("alpha", 0.001 * point.get("iter_num", 0))
        save_file({"weight": torch.tensor([scale])}, place / WEIGHTS)
        return place

    def judged(model: str) -> dict[str, float]:
        scale = float(load_file(Path(model) / WEIGHTS)["weight"])
        return {"one": 1 - abs(scale - 1.3), "one_stderr": 0.1}

    monkeypatch.setattr(fusion, "merged", merged)
    monkeypatch.setattr(fusion, "validation", judged)
    config = {"test_datasets": {"one": {}}}
    chosen, rows = fusion.tune(["tsv-m", "wudi"], config, tmp_path)
    assert chosen == {"tsv-m": {"alpha": 1.3}, "wudi": {"iter_num": 1000}}
    assert [row["settings"] for row in rows[:8]] == fusion.METHODS["tsv-m"].points()
    assert [row["accuracy"]["one"] for row in rows[:8]] == pytest.approx(
        [1 - abs(row["settings"]["alpha"] - 1.3) for row in rows[:8]], abs=1e-6
    )
    # Of a scale the ends only: the others lie between.
    assert made == [{"alpha": 0.5}, {"alpha": 2.0}, *fusion.METHODS["wudi"].points()]
    assert not list(tmp_path.glob("*/"))
    assert fusion.tune(["tsv-m", "wudi"], config, tmp_path) == (chosen, rows)
    assert len(made) == 5


def test_no_method_has_more_settings_than_mergekits() -> None:
    assert all(1 <= len(method.points()) <= 8 for method in fusion.METHODS.values())


def test_each_peer_has_one_row() -> None:
    rows = [*fusion.METHODS, *IN_MEMORY]
    assert len(rows) == len(set(rows))
    assert {slug(name) for name in BESIDE_MERGEKIT} <= set(rows)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tsv-m", "wudi", "adamerging", "cart-adamerging"])
def test_the_program_saves_an_encoder_that_can_be_judged(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    for data in config["test_datasets"].values():  # a process of its own has the real texts
        data |= {"_target_": f"{__name__}.texts", "count": 24}
    point = fusion.METHODS[key].points()[0]
    place = fusion.merged(key, point, config, tmp_path / "merges")
    assert fusion.merged(key, point, config, tmp_path / "merges") == place
    model = load_encoder(place)
    assert (place / "tokenizer.json").is_file()
    if key == "tsv-m":
        base = encoder(0).state_dict()[QUERY]
        taus = [encoder(seed).state_dict()[QUERY] - base for seed in (1, 2, 3)]
        expected = base + point["alpha"] * tsvm([factored(tau) for tau in taus])
        assert torch.allclose(model.state_dict()[QUERY], expected, atol=1e-4)
