"""The README says what the result files and the code say."""

import re

import yaml

from benchmarks.readme import ROOT, filled

README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files() -> None:
    assert "<!-- from " in README
    assert filled(README) == README, "run `make readme`"


def test_a_changed_result_changes_the_text(tmp_path) -> None:
    (tmp_path / "table.md").write_text("| new |\n")
    text = "a\n<!-- from table.md -->\n| old |\n<!-- end -->\nb"
    assert filled(text, tmp_path) == "a\n<!-- from table.md -->\n\n| new |\n\n<!-- end -->\nb"


def test_linked_files_exist() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert linked
    missing = [path for path in linked if not (ROOT / path).exists()]
    assert not missing


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    )
    assert named
    assert named <= targets


def test_the_table_of_parameters_is_the_methods() -> None:
    from cart_plugin.mergekit import SPEC

    table = README.split("## Parameters")[1].split("\n\n")[1]
    described = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(described) == sorted(parameter.name for parameter in SPEC.parameters)


def test_recipes_are_mergekit_recipes() -> None:
    from mergekit.config import MergeConfiguration, ParameterSetting
    from pydantic import TypeAdapter

    for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        document = yaml.safe_load(block)
        if "merge_method" in document:
            MergeConfiguration.model_validate(document)
        elif "_target_" in document:  # a model pool of FusionBench's
            assert document["_target_"].startswith("fusion_bench.modelpool.")
            assert len(document["models"]) >= 3
        else:
            for value in document["parameters"].values():
                TypeAdapter(ParameterSetting).validate_python(value)


def test_the_python_example_runs() -> None:
    import torch

    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # The other one, of PEFT, runs in tests/compress.
    (example,) = (text for text in examples if "cart_plugin" in text)
    generator = torch.Generator().manual_seed(0)
    states = {
        f"{name}_state": {"layer.weight": torch.randn(16, 24, generator=generator)}
        for name in ("math", "code", "german")
    }
    namespace: dict = dict(states)
    exec(example, namespace)  # noqa: S102
    assert namespace["merged"]["layer.weight"].shape == (16, 24)


def test_the_rule_of_auto_is_the_one_in_the_code() -> None:

    from cart_plugin.linalg import svd

    assert "at most an eighth of the full rank" in README
    assert svd._FAST_SHARE == 1 / 8
    assert f"short sides of {svd._FAST_SIDE} or more" in README
    assert "below\nsix times that" in README
    assert svd._FAST_ASPECT == 6
    assert f"Above {svd._GRAM_SHARE:.0%}".replace("%", " %") in README
