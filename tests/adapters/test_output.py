"""The folder that is written: who reads it, what is in it, and that it is always the same."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import (
    change_config,
    change_tensors,
    config_of,
    farthest,
    load,
    save_loras,
    state,
    tensors,
)


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.pop("report.json")  # it holds seconds
    return found


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(1, 17)[None]).logits
    return logits


def test_peft_answers_as_the_whole_model(base: Path, trio: list[Path], tmp_path: Path) -> None:
    merge_adapters(trio, tmp_path / "out", rank="full")
    model = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    expected = load(base)
    expected.load_state_dict(state(base, tmp_path / "out"))
    assert torch.allclose(answer(model), answer(expected), atol=1e-5)
    assert not torch.allclose(answer(model), answer(load(base)), atol=1e-2)


def test_one_adapter_gives_itself(base: Path, trio: list[Path], tmp_path: Path) -> None:
    for method in ("auto", "cart", "linear"):
        report = merge_adapters(trio[:1], tmp_path / method, method=method)
        assert report.rank == 4
        assert farthest(state(base, tmp_path / method), state(base, trio[0])) < 1e-6
        assert report.cut[0].kept == pytest.approx(1, abs=1e-6)
        assert report.cut[0].error < 1e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6)])
@pytest.mark.parametrize("config", [{"r": 8, "use_rslora": True}, {"lora_alpha": 12.5}])
def test_one_adapter_whose_scale_no_whole_alpha_gives_has_it_in_b(
    config: dict[str, Any], dtype: torch.dtype, error: float, base: Path, tmp_path: Path
) -> None:
    """Rounded once, in its dtype: servers read a whole alpha, and llama.cpp no rsLoRA."""
    one, _ = save_loras(tmp_path, base, [config, {}])
    change_tensors(one, lambda held: held.update({k: held[k].to(dtype) for k in held}))
    merge_adapters([one], tmp_path / "alone")
    merge_adapters([one], tmp_path / "exact", dtype="float32")
    before, after = tensors(one), tensors(tmp_path / "alone")
    assert all(torch.equal(after[name], before[name]) for name in before if "lora_A" in name)
    expected, start = state(base, one), load(base).state_dict()
    size = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert 0 < farthest(state(base, tmp_path / "alone"), expected) <= error * size
    assert farthest(state(base, tmp_path / "exact"), expected) <= 1e-6 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_alpha": 3}, {"rank_pattern": {"q_proj": 2}}]
)
def test_one_adapter_gives_its_own_factors(
    config: dict[str, Any], dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    """Bit for bit: decomposed and rounded anew, one in bfloat16 would lose 0.2 %."""
    one, other = save_loras(tmp_path, base, [config, {}])
    for folder in (one, other):
        change_tensors(folder, lambda held: held.update({k: held[k].to(dtype) for k in held}))
    merge_adapters([one], tmp_path / "alone")
    merge_adapters([one, other], tmp_path / "other-of-no-weight", weights=[0.5, 0.0])
    merge_adapters([one], tmp_path / "wide", rank=8)
    expected = state(base, one)
    for name in ("alone", "other-of-no-weight", "wide"):
        assert farthest(state(base, tmp_path / name), expected) == 0, name
        assert {tensor.dtype for tensor in tensors(tmp_path / name).values()} == {dtype}
    if "rank_pattern" not in config:
        assert farthest(tensors(tmp_path / "alone"), tensors(one)) == 0
    report = merge_adapters([one], tmp_path / "narrow", rank=1)
    assert 0 < report.cut[0].kept < 1
    assert config_of(tmp_path / "narrow")["lora_alpha"] == 1


@pytest.mark.parametrize("method", ["auto", "cart", "linear"])
def test_neither_order_nor_threads_change_a_byte(
    method: Any, trio: list[Path], tmp_path: Path
) -> None:
    outs = []
    before = torch.get_num_threads()
    for number, order in enumerate(itertools.permutations(range(3))):
        out = tmp_path / str(number)
        torch.set_num_threads(1 + number % 3)
        weights = [[2.0, 1.0, 1.5][index] for index in order]
        merge_adapters([trio[index] for index in order], out, method=method, weights=weights)
        assert torch.get_num_threads() == 1 + number % 3
        outs.append(files(out))
    torch.set_num_threads(before)
    assert all(out == outs[0] for out in outs[1:])
    assert outs[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_rank_is_that_of_every_module(base: Path, tmp_path: Path) -> None:
    adapters = save_loras(tmp_path, base, [{"r": 2}, {"r": 6, "rank_pattern": {"v_proj": 3}}])
    for rank, expected in ((None, 6), (3, 3), (40, 40), ("full", 8)):
        out = tmp_path / f"rank-{rank}"
        report = merge_adapters(adapters, out, rank=rank)
        assert report.rank == config_of(out)["r"] == config_of(out)["lora_alpha"] == expected
        for name, tensor in tensors(out).items():
            assert tensor.shape == (
                (expected, 32) if "lora_A" in name else (tensor.shape[0], expected)
            )
            peft.PeftModel.from_pretrained(load(base), str(out))
    states = [state(base, tmp_path / f"rank-{rank}") for rank in (40, "full")]
    assert farthest(*states) < 1e-6  # the rest is zeros


def test_a_cut_keeps_more_than_one_by_the_size_of_singular_values(
    base: Path, trio: list[Path], tmp_path: Path
) -> None:
    """Of the adapters' own answers, which are what counts, not of the merged matrix."""
    report = merge_adapters(trio, tmp_path / "own", rank=4)
    merge_adapters(trio, tmp_path / "full", rank="full")

    def plain(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            u, s, vh = torch.linalg.svd(held[other] @ held[name])
            held[name], held[other] = vh[:4].contiguous(), (u[:, :4] * s[:4]).contiguous()

    change_tensors(tmp_path / "full", plain)
    change_config(tmp_path / "full", r=4, lora_alpha=4)
    taus = [state(base, one) for one in (*trio, tmp_path / "own", tmp_path / "full")]
    start = state(base)
    lost = [0.0, 0.0]
    for adapter, (index, cut) in itertools.product(taus[:3], enumerate(taus[3:])):
        for name, tensor in adapter.items():
            tau = tensor - start[name]
            if tau.abs().max() > 1e-3:
                error = (cut[name] - tensor) @ tau.mT
                lost[index] += float(error.square().sum() / tau.square().sum())
    assert lost[0] < 0.97 * lost[1]
    assert 0 < min(kept.kept for kept in report.cut) < min(kept.kept for kept in report.exact) < 1.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_dtypes(dtype: str | None, own_trio: list[Path], base: Path, tmp_path: Path) -> None:
    for adapter in own_trio[:2]:
        change_tensors(
            adapter, lambda held: held.update({name: held[name].bfloat16() for name in held})
        )
    merge_adapters(own_trio, tmp_path / "out", dtype=dtype)
    expected = getattr(torch, dtype or "float32")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {expected}
    merge_adapters(own_trio, tmp_path / "exact")
    bar = {"float16": 1e-3, "bfloat16": 1e-2}.get(str(dtype), 1e-7)
    assert farthest(state(base, tmp_path / "out"), state(base, tmp_path / "exact")) < bar
    merge_adapters(own_trio[:2], tmp_path / "both")
    assert {tensor.dtype for tensor in tensors(tmp_path / "both").values()} == {torch.bfloat16}


def test_the_dtype_holds_both_factors(own_trio: list[Path], tmp_path: Path) -> None:
    for adapter in own_trio:
        change_tensors(
            adapter, lambda held: held.update({k: held[k].bfloat16() for k in held if "_A" in k})
        )
    merge_adapters(own_trio, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.float32}


def test_bases_that_are_one(own_trio: list[Path], base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    change_config(own_trio[1], base_model_name_or_path=str(link))
    change_config(own_trio[2], base_model_name_or_path=None)
    merge_adapters(own_trio, tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(link)
    merge_adapters(own_trio, tmp_path / "named", base="org/base")
    assert config_of(tmp_path / "named")["base_model_name_or_path"] == "org/base"
    report = merge_adapters(own_trio[2:], tmp_path / "none")
    assert any("no adapter names its base" in note for note in report.notes)


def test_the_main_revision_has_two_names(own_trio: list[Path], tmp_path: Path) -> None:
    change_config(own_trio[1], revision="main")
    merge_adapters(own_trio, tmp_path / "out")
    assert config_of(tmp_path / "out")["revision"] == "main"
    change_config(own_trio[1], base_model_name_or_path=None, revision=None)
    for adapter in (own_trio[0], own_trio[2]):
        change_config(adapter, revision="v1")
    merge_adapters(own_trio, tmp_path / "one-says-nothing")
    assert config_of(tmp_path / "one-says-nothing")["revision"] == "v1"


def test_an_adapter_of_the_hubs_cache(
    trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--org--math"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(trio[0], cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    report = merge_adapters(["org/math", trio[1]], tmp_path / "out")
    assert report.paths == {"math": "org/math", "code": str(trio[1])}
    merge_adapters(trio[:2], tmp_path / "local")
    assert files(tmp_path / "out") == files(tmp_path / "local")


@pytest.mark.parametrize("method", ["auto", "cart", "linear"])
def test_torchs_default_device_does_not_matter(
    method: Any, own_trio: list[Path], base: Path, tmp_path: Path
) -> None:
    """One of them lacks modules, and one has a bias of B: all that is made anew."""
    more = save_loras(tmp_path / "more", base, [{"target_modules": ["q_proj"], "lora_bias": True}])
    merge_adapters([*own_trio, *more], tmp_path / "out", method=method)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in other threads it is the CPU
    torch.set_default_device("meta")
    try:
        merge_adapters([*own_trio, *more], tmp_path / "meta", method=method)
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(threads)
    assert files(tmp_path / "meta") == files(tmp_path / "out")


def test_side_files_that_all_have_alike(own_trio: list[Path], tmp_path: Path) -> None:
    for adapter in own_trio:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (adapter / name).write_text("{}")
        for name in ("README.md", "trainer_state.json", "report.json", "optimizer.pt"):
            (adapter / name).write_text("{}")
    report = merge_adapters(own_trio, tmp_path / "out")
    own = {"adapter_config.json", "adapter_model.safetensors", "report.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | tokenizer
    assert (tmp_path / "out" / "report.json").read_text() != "{}"
    assert not report.notes
    (own_trio[1] / "tokenizer.json").write_text("[]")
    report = merge_adapters(own_trio, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == own
    assert any("have the same chat_template.jinja, tokenizer.json" in note for note in report.notes)


def test_folders_of_modules_json_come_along_or_it_does_not(
    own_trio: list[Path], tmp_path: Path
) -> None:
    listed = {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    for adapter in own_trio:
        for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "3_Other/config.json"):
            (adapter / name).parent.mkdir()
            (adapter / name).write_text("{}")
        paths = ("", "1_Pooling", "2_Dense")
        (adapter / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))

    def held(out: Path) -> set[str]:
        found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        return found - {"adapter_config.json", "adapter_model.safetensors", "report.json"}

    assert not merge_adapters(own_trio, tmp_path / "out").notes
    assert held(tmp_path / "out") == listed
    (own_trio[1] / "2_Dense" / "model.safetensors").write_text("other")
    notes = merge_adapters(own_trio, tmp_path / "again").notes
    assert held(tmp_path / "again") == set()
    assert notes == [f"not all adapters have the same {', '.join(sorted(listed))}: left out"]


def test_folders_of_one_name_are_told_apart(own_trio: list[Path], tmp_path: Path) -> None:
    places = []
    for adapter in own_trio:
        place = tmp_path / f"of-{adapter.name}" / "adapter"
        place.parent.mkdir()
        places.append(adapter.rename(place))
    report = merge_adapters(places, tmp_path / "out")
    assert list(report.paths) == ["of-math/adapter", "of-code/adapter", "of-german/adapter"]


def test_what_the_report_says(trio: list[Path], tmp_path: Path) -> None:
    report = merge_adapters(trio, tmp_path / "out", weights=[2, 1, 1], names=["a", "b", "c"])
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (written["method"], written["rank"], written["exact_rank"]) == ("auto", 4, 12)
    assert written["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert [entry["weight"] for entry in written["adapters"].values()] == [0.5, 0.25, 0.25]
    assert written["adapters"]["a"]["path"] == str(trio[0])
    assert written["adapters"]["a"]["rank"] == 4
    kept = [entry["kept"] for entry in written["adapters"].values()]
    assert kept == [entry.kept for entry in report.cut]
    assert kept[0] > kept[1]
    assert len(written["pairs"]) == 3
    assert len(written["modules"]) == 4
    assert {module for module, _, _ in report.worst()} <= written["modules"].keys()
    values = [entry[2].kept for entry in report.worst()]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        ("same", "math and twin are nearly the same (cosine 1.00)"),
        ("start", "math and twin were trained from one start"),
        ("opposite", "the adapters' differences cancel: their average has 0% of the squares"),
        ("large", "twin dominates: its difference is"),
        ("tiny", "twin changes next to nothing: its difference is"),
    ],
)
def test_what_the_report_warns_of(
    make: str, note: str, own_trio: list[Path], tmp_path: Path
) -> None:
    math, code, _ = own_trio
    twin = code.rename(tmp_path / "twin")
    start = tensors(math)

    def change(held: dict[str, torch.Tensor]) -> None:
        for name in held:
            if make == "opposite":
                held[name].copy_(-start[name] if "lora_B" in name else start[name])
            elif make in ("large", "tiny"):
                held[name].mul_(10 if make == "large" else 1e-4)
            elif make == "same" or "lora_A" in name:
                held[name].copy_(start[name] + 0.01 * held[name])

    change_tensors(twin, change)
    report = merge_adapters([math, twin], tmp_path / "out")
    assert [found for found in report.notes if note in found], report.notes
    assert len(report.notes) == (2 if make == "opposite" else 1)  # they have one A, too


def test_wide_factors_share_much_by_chance(base: Path, tmp_path: Path) -> None:
    """Of 20 among 32 inputs, 60 %: no sign of one start."""
    adapters = save_loras(tmp_path, base, [{}, {}], r=20)
    report = merge_adapters(adapters, tmp_path / "out")
    assert report.inputs[0, 1] > 0.5
    assert not any("one start" in note for note in report.notes)


def test_what_does_not_count_is_not_among_what_keeps_least(
    trio: list[Path], tmp_path: Path
) -> None:
    report = merge_adapters(trio, tmp_path / "out", weights=[1, 1, 0])
    assert {name for _, name, _ in report.worst()} == {"math", "code"}


def test_cart_that_adds_nothing_says_so(trio: list[Path], tmp_path: Path) -> None:
    report = merge_adapters(trio[:2], tmp_path / "two", method="cart")
    assert any("with two adapters the method cart is plain averaging" in n for n in report.notes)
    report = merge_adapters(trio, tmp_path / "all", method="cart", keep=12)
    assert any("is nearly the plain average; keep less" in note for note in report.notes)
    report = merge_adapters(trio, tmp_path / "some", method="cart", keep=2)
    assert not report.notes


def test_progress_is_told(trio: list[Path], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    merge_adapters(trio, tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == [("merging", number, 4) for number in range(1, 5)]


def test_adapters_with_no_module_in_common_are_pointed_at(base: Path, tmp_path: Path) -> None:
    """Two versions of transformers may call the same ones otherwise; it is no reason to refuse."""
    modules = [["q_proj"], ["down_proj"], ["q_proj", "down_proj"]]
    folders = save_loras(tmp_path, base, [{"target_modules": names} for names in modules])
    apart = merge_adapters(folders[:2], tmp_path / "apart").notes
    assert sum("code and math have no module in common" in note for note in apart) == 1
    for several in (folders, folders[1:]):
        together = merge_adapters(several, tmp_path / f"together{len(several)}").notes
        assert not any("no module in common" in note for note in together)
