"""The plugin installed beside the mergekit that these tests' Python has."""

import hashlib
from pathlib import Path

import pytest

from tests.autoload.environment import Environment

METHODS = ["linear", "ties", "dare_ties", "task_arithmetic", "sce"]


def write_models(folder: Path) -> list[Path]:
    """Write three small models that differ; returns their folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(folder / f"model-{seed}")
        LlamaForCausalLM(config).save_pretrained(paths[-1])
    return paths


def recipe(
    folder: Path, models: list[Path], method: str = "cart", base: Path | None = None
) -> Path:
    lines = [f"merge_method: {method}", "dtype: float32", "models:"]
    lines += [
        f"  - model: {model}\n    parameters: {{weight: 1.0, density: 0.5}}" for model in models
    ]
    if base is not None:
        lines.append(f"base_model: {base}")
    path = folder / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def weights_of(folder: Path) -> str:
    """One hash of all weight files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_evolve_and_registry_know_cart(real_environment: Environment) -> None:
    program = (
        "from mergekit.evo.genome import METHOD_PARAM_MAPS as maps; print(maps['cart'])\n"
        "from mergekit.merge_methods import get; print(type(get('cart')).__module__)\n"
        "from cart_plugin.autoload import hook; print(hook.status().error)"
    )
    assert real_environment.output_of(program, "-I") == "['weight']\ncart_plugin.mergekit"


def test_isolated_module_merges(real_environment: Environment, tmp_path: Path) -> None:
    models = write_models(tmp_path)
    out = tmp_path / "out"
    done = real_environment.run(
        "-I", "-m", "mergekit.scripts.run_yaml", recipe(tmp_path, models), out
    )

    assert done.returncode == 0, done.stderr
    assert weights_of(out) not in {weights_of(model) for model in models}


def test_missing_dependency_leaves_mergekit_working(real_environment: Environment) -> None:
    real_environment.write({"cart_plugin/linalg/svd.py": "import scipy_is_missing"})
    program = (
        "from mergekit.merge_methods import get; print(get('ties').spec.name)\n"
        "from cart_plugin.autoload import hook; print('scipy_is_missing' in hook.status().error)"
    )
    assert real_environment.output_of(program) == "ties\nTrue"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-S"]])
def test_every_command_merges_with_the_fallback(
    real_environment: Environment, tmp_path: Path, options: list[str]
) -> None:
    models = write_models(tmp_path)
    single = recipe(tmp_path, models)
    flat = recipe(tmp_path / "model-0", [model / "model.safetensors" for model in models])
    multi = tmp_path / "multi.yaml"
    multi.write_text(single.read_text() + "name: merged\n")
    merges = [f"--merge={model}" for model in models]
    installed = (real_environment.site / "installed.pth").read_text().strip()
    paths = f"{real_environment.site}:{installed}"  # -S reads no .pth files

    for command, arguments, out in [
        ("mergekit-yaml", [single, tmp_path / "yaml"], tmp_path / "yaml"),
        ("mergekit-pytorch", [flat, tmp_path / "flat"], tmp_path / "flat"),
        ("mergekit-legacy", [tmp_path / "legacy", *merges, "--method=cart"], tmp_path / "legacy"),
        (
            "mergekit-multi",
            [multi, f"--intermediate-dir={tmp_path / 'multi'}"],
            tmp_path / "multi/merged",
        ),
    ]:
        done = real_environment.run(
            *options, "-m", "cart_plugin", command, *arguments, PYTHONPATH=paths
        )
        assert done.returncode == 0, done.stderr
        assert weights_of(out)


@pytest.mark.slow
def test_wheel_and_editable_install_merge_to_the_same_bytes(
    real_environment: Environment, editable_wheel: Path, tmp_path: Path
) -> None:
    models = write_models(tmp_path)
    editable = Environment(tmp_path / "editable")
    editable.add_installed_packages()
    editable.install(editable_wheel)

    hashes = set()
    for seed, environment in enumerate([real_environment, editable, real_environment]):
        out = tmp_path / f"out-{seed}"
        arguments = ["-m", "mergekit.scripts.run_yaml", recipe(tmp_path, models), out]
        done = environment.run(*arguments, PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
        hashes.add(weights_of(out))
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_give_the_same_bytes_without_the_plugin(
    real_environment: Environment, tmp_path: Path, method: str
) -> None:
    without = Environment(tmp_path / "without")
    without.add_installed_packages()
    base, *models = write_models(tmp_path)
    text = recipe(tmp_path, models, method, None if method == "linear" else base)

    hashes = []
    for name, environment in (("with", real_environment), ("without", without)):
        out = tmp_path / f"out-{name}"
        done = environment.run("-m", "mergekit.scripts.run_yaml", text, out, "--random-seed=1")
        assert done.returncode == 0, done.stderr
        hashes.append(weights_of(out))
    assert hashes[0] == hashes[1]
