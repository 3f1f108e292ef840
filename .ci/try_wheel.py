"""Try a built wheel as people will use it: `python .ci/try_wheel.py dist/*.whl` (`make dist`).

Installs the wheel by pip into an environment of its own, which sees the packages that are already
here instead of fetching torch again, and runs there, far from the checkout: the doctor, a merge of
tiny models by mergekit-yaml, the recipes that come along, and FusionBench's configs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests' tiny models
os.environ["HF_HUB_OFFLINE"] = "1"

MERGE = "from mergekit.scripts.run_yaml import main; main()"
RECIPES = "from cart_plugin.doctor.recipe import example_recipes; print(example_recipes())"
CONFIGS = "from fusion_bench.scripts.cli import _hydra_main; _hydra_main()"


class Environment:
    """A virtual environment with one wheel, beside what this Python has installed."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.bin = folder / "bin"
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.work = folder / "work"
        self.work.mkdir()
        pip = ["-m", "pip", "--disable-pip-version-check"]
        self.run("python", *pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
        (self.site,) = folder.glob("lib/python*/site-packages")
        # A path that a .pth file names is searched for modules; its own .pth files are not read, so
        # that an editable install of this package there stays without effect.
        (self.site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, *arguments: str | Path) -> str:
        """What a program of the environment prints; ends everything if it fails."""
        done = subprocess.run(
            [self.bin / program, *arguments],
            capture_output=True,
            text=True,
            cwd=self.work,
            env=self.variables,
        )
        if done.returncode:
            sys.exit(f"{program} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
        return done.stdout


def main(wheel: Path) -> None:
    """Install and try the wheel; exit with what went wrong, if anything did."""
    from tests.doctor.tiny import load_tensors, save_models, write_recipe

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = Environment(folder / "environment", wheel.resolve())
        models = save_models(folder, "llama")
        recipe = write_recipe(folder / "cart.yaml", models)

        said = environment.run("mergekit-cart", "doctor", recipe)
        assert "mergekit knows `cart` (through zzz_cart_plugin.pth" in said, said
        print("doctor: no problems, and the hook is installed")

        out = folder / "merged"
        environment.run("python", "-c", MERGE, recipe, out, "--no-write-model-card")
        assert set(load_tensors(out)) == set(load_tensors(models[0]))
        print("mergekit-yaml: merged three tiny models by cart")

        recipes = Path(environment.run("python", "-c", RECIPES).strip())
        assert recipes.is_relative_to(environment.site), recipes
        names = {file.name for file in recipes.iterdir()}
        assert names == {file.name for file in (ROOT / "configs" / "mergekit").iterdir()}
        print(f"recipes: {len(names)} in the wheel")

        configs = ["+experiment=cart/clip-vit-b32_8-tasks", "--cfg", "job"]
        said = environment.run("python", "-c", CONFIGS, *configs)
        assert "_target_: cart_plugin.fusion_bench.algorithm.CartAlgorithm" in said, said
        assert "rank_ratio: 0.12" in said, said
        print("fusion_bench: the methods' and the experiments' configs are found")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
