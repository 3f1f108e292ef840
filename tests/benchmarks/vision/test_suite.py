"""The suite end to end on tiny encoders of two tasks, and its parts."""

import json
import shlex

import pytest
import torch
from click.testing import CliRunner

from benchmarks.vision import backbone, jobs, methods, suite, tasks
from benchmarks.vision.methods import METHODS, MOST_POINTS
from benchmarks.vision.program import command
from benchmarks.vision.run import Plan, of_a_peer
from tests.benchmarks.synthetic import BLOCKS

pytest.importorskip("fusion_bench")

NAMES = ("blocks", "more")
SMOKE = ("average", "task_arithmetic", "model_stock", "regmean", "cart", "cart_indexing")


@pytest.fixture
def two_tasks(tiny_suite, monkeypatch):
    """Two tasks and a tiny pretrained encoder; nothing is fetched."""
    monkeypatch.setitem(tasks.TASKS, "more", BLOCKS)
    monkeypatch.setattr(backbone, "prepare_backbone", lambda: tiny_suite)
    return tiny_suite


def invoke(out, *more):
    arguments = ["--tasks", ",".join(NAMES), "--out", str(out), "--workers", "0", *more]
    sizes = ["--validation-images", "8", "--test-images", "12"]
    outcome = CliRunner().invoke(suite.main, [*arguments, *sizes], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:with two models CART")
def test_the_whole_suite_on_two_tiny_tasks_and_again_from_its_record(
    two_tasks, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    options = ("--seeds", "0", "--methods", ",".join(SMOKE))
    invoke(out, *options)
    saved = json.loads((out / "results.json").read_text())
    rows = {row["key"]: row for row in saved["rows"]}
    assert list(rows) == ["pretrained", "individual", *SMOKE]
    assert saved["failed"] == {}
    for key, row in rows.items():
        assert len(row["seeds"]) == len(row["commands"]) == 1
        assert set(row["seeds"][0]["accuracy"]) == set(NAMES)
        assert all("taskpool.split=test" in line for line in row["commands"])
        if key in METHODS:
            best = max(saved["tuning"][key], key=lambda entry: entry["mean"])
            assert row["setting"] in [
                entry["setting"] for entry in saved["tuning"][key] if entry["mean"] == best["mean"]
            ]
            assert set(best["accuracy"]) == set(NAMES)
            assert "taskpool.split=validation" in best["command"]
    assert {path.name for path in out.glob("*.png")} == {
        *("methods.png", "radar.png", "rank_and_lambda.png", "number_of_tasks.png"),
        "indexing.png",
    }
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert "| CART |" in (out / "table.md").read_text()

    def never(*_):
        raise AssertionError("a known case was done again")

    monkeypatch.setattr("benchmarks.vision.jobs.run", never)
    invoke(out, *options)
    assert json.loads((out / "results.json").read_text()) == saved


@pytest.fixture
def laid_out(two_tasks):
    """The suite's folder for FusionBench."""
    from rich.console import Console

    plan = Plan(NAMES, (0,), 8, 12)
    suite.prepare(plan, 0, Console(quiet=True))
    return plan


def test_fusion_bench_gives_the_accuracy_of_the_encoder_folders(laid_out):
    from benchmarks.vision.evaluate import evaluate_encoder
    from benchmarks.vision.finetune import encoder_folder, load_head
    from benchmarks.vision.program import SINGLE, evaluate, merge
    from benchmarks.vision.strength import strength

    settings = strength("blocks")
    heads = {name: load_head(name, 0, settings) for name in NAMES}
    merged = merge(["method=dummy", _as_pretrained("more")])
    found = evaluate({SINGLE: merged.states[SINGLE]}, laid_out.pools("test"))
    folder = encoder_folder("more", 0, settings)
    assert found == pytest.approx(evaluate_encoder(folder, heads, "test", 12))


@pytest.mark.slow
def test_scales_between_two_merges_are_what_the_method_gives(laid_out):
    from benchmarks.common.fusion import between
    from benchmarks.vision.program import SINGLE, merge

    for key in [key for key, method in METHODS.items() if method.scale]:
        method = METHODS[key]
        rest, scales = next(iter(method.groups()))
        low, middle, high = (
            merge(method.overrides({**rest, method.scale: scale})).states
            for scale in (scales[0], scales[1], scales[-1])
        )
        assert set(low) == ({SINGLE} if not method.keeps else set(NAMES))
        share = (scales[1] - scales[0]) / (scales[-1] - scales[0])
        for task, state in low.items():
            for name, tensor in between(state, high[task], share).items():
                assert torch.allclose(tensor, middle[task][name], atol=1e-5), (key, name)


@pytest.mark.filterwarnings("ignore:with two models CART")
def test_a_recorded_command_gives_the_recorded_accuracy(laid_out):
    from benchmarks.vision.program import evaluate, merge, program, quiet

    pools = laid_out.pools("test")
    for key in ("average", "cart", "tsvm", "emr", "cart_indexing"):
        method = METHODS[key]
        overrides = [*method.overrides(method.points()[0]), *pools]
        recorded = evaluate(merge(overrides).states, pools)
        with quiet():
            report = program(overrides).run()["report"]  # as the command line does
        report = report.get("indexed", report)
        assert {name: report[name]["accuracy"] for name in NAMES} == pytest.approx(recorded), key


@pytest.mark.parametrize("key", ["aswudi", "swudi", "ace", "dc_merge", "svc", "svc_tsvm"])
def test_peers_merge_matrices_by_their_function_and_nothing_else(laid_out, key):
    from benchmarks.common import peers
    from benchmarks.vision.program import SINGLE, merge

    def state(*overrides):
        return merge(list(overrides)).states[SINGLE]

    merged_by = {
        "aswudi": lambda taus, _: peers.aswudi(taus),
        "swudi": lambda taus, _: peers.swudi(taus, time=1300, rank_ratio=0.85),
        "ace": lambda taus, _: peers.ace(taus, eps=1e-3),
        "dc_merge": lambda taus, _: 1.6 * peers.dc_merge(taus, density=1e-2),
        "svc": lambda taus, before: peers.svc(before, taus),
        "svc_tsvm": lambda taus, before: peers.svc(before, taus, 1.0),
    }[key]
    without = {  # what gives all that is not a matrix, and what SVC starts from
        "svc": ("method=task_arithmetic", "method.scaling_factor=1.0"),
        "svc_tsvm": ("method=task_singular_vector/TaskSingularVectorMerging", "method.alpha=2.0"),
        "dc_merge": ("method=task_arithmetic", f"method.scaling_factor={1.6 / len(NAMES)}"),
    }.get(key, ("method=simple_average",))
    base, before = state("method=dummy"), state(*without)
    tuned = [state("method=dummy", _as_pretrained(name)) for name in NAMES]
    method = METHODS[key]
    for name, tensor in state(*method.overrides(method.points()[-1])).items():
        expected = before[name]
        if tensor.dim() == 2:
            taus = [one[name] - base[name] for one in tuned]
            expected = base[name] + merged_by(taus, before[name] - base[name])
        assert torch.allclose(tensor, expected, atol=1e-5), name


def _as_pretrained(task):
    return f"modelpool.models._pretrained_=${{modelpool.models.{task}}}"


def test_doge_learns_what_fusion_bench_learns():
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    from benchmarks.vision.extra import MatrixDOGE

    generator = torch.Generator().manual_seed(0)
    tasks = [{"w": 0.02 * torch.randn(5, 4, generator=generator)} for _ in range(3)]
    learned = []
    for kind in (MatrixDOGE, DOGE_TA_Algorithm):
        method = kind(subspace=6, K=30, lamda=0.07)
        method.lamdas = method.compute_layer_lamdas(tasks)
        method.projection = {"w": torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0]))}
        method.optimize_delta(tasks)
        learned.append(method.delta["w"])
    assert learned[1].abs().max() > 1e-3
    assert torch.allclose(*learned, atol=1e-5)


def test_doge_leaves_all_but_the_matrices_of_the_blocks_alone(laid_out):
    from benchmarks.vision.program import SINGLE, merge

    base = merge(["method=dummy"]).states[SINGLE]
    merged = merge(METHODS["doge"].overrides(METHODS["doge"].points()[0])).states[SINGLE]
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed == {
        name for name, tensor in base.items() if "encoder" in name and tensor.dim() == 2
    }


def test_no_method_may_choose_from_more_settings_than_the_others():
    assert all(1 <= len(method.points()) <= MOST_POINTS for method in METHODS.values())
    for method in METHODS.values():
        assert method.scale in (None, list(method.grid)[-1:] and list(method.grid)[-1])


def test_the_record_knows_which_cases_the_peers_decide():
    decided = [
        key for key, method in METHODS.items() if of_a_peer(command(method.overrides({})) + " ")
    ]
    assert decided == ["aswudi", "swudi", "ace", "dc_merge", "svc", "svc_tsvm"]


def test_the_command_of_fewer_tasks_leaves_the_others_out():
    plan = Plan(("a", "b", "c"), (3,), 10, 20)
    line = command([*METHODS["cart"].overrides({"rank_ratio": 0.16}), *plan.pools("test", count=2)])
    words = shlex.split(line)
    assert words[0] == "fusion_bench"
    assert {"method=cart", "method.rank_ratio=0.16", "modelpool.seed=3"} <= set(words)
    assert "~modelpool.models.c" in words
    assert not any(word.startswith("~") and word.endswith((".a", ".b")) for word in words)


def test_an_unknown_method_ends_with_one_line(tmp_path):
    outcome = CliRunner().invoke(suite.main, ["--methods", "crat", "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "unknown: crat; known are average" in outcome.output


def test_a_method_that_fails_is_recorded_with_its_error(laid_out, monkeypatch):
    broken = methods.Method("broken", "no_such_method")
    found = jobs.run(jobs.Job(broken, {}, tuple(laid_out.pools("validation"))))
    assert [list(case) for case in found.values()] == [["error"]]
