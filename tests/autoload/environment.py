"""Throw-away environments in which a built wheel is unpacked as pip would."""

import atexit
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A stand-in of mergekit with the names that the hook relies on; the real one takes seconds to load.
MERGEKIT = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": (
        "from mergekit.merge_methods.registry import register, registered_methods\n"
    ),
    "mergekit/merge_methods/registry.py": (
        "METHODS = {}\n"
        "def register(method):\n"
        "    if method in METHODS:\n"
        "        raise ValueError(f'{method} is already registered')\n"
        "    METHODS[method] = method\n"
        "def registered_methods():\n"
        "    return tuple(METHODS)\n"
    ),
    "mergekit/merge_methods/data.txt": "a resource",
    "mergekit/evo/__init__.py": "",
    "mergekit/scripts.py": (
        "import sys\n"
        "from mergekit.merge_methods import registered_methods\n"
        "def main():\n"
        "    print(sys.argv, registered_methods())\n"
        "    return 3\n"
        "def work(_):\n"
        "    return registered_methods()\n"
        "def spawn():\n"
        "    from multiprocessing import get_context\n"
        "    with get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [0]))\n"
    ),
    "mergekit-0.1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: mergekit\nVersion: 0.1.5\n",
    "mergekit-0.1.5.dist-info/entry_points.txt": (
        "[console_scripts]\n"
        "mergekit-yaml = mergekit.scripts:main\n"
        "mergekit-spawn = mergekit.scripts:spawn\n"
        "mergekit-broken = mergekit.not_there:main\n"
        "[another_group]\n"
        "not-a-command = mergekit.scripts:main\n"
    ),
    "mergekit/evo/genome.py": "METHOD_PARAM_MAPS = {'linear': ['weight']}\n",
}
ADAPTER = {
    "cart_plugin/mergekit.py": (
        "from mergekit import merge_methods\n"
        "registered = False\n"
        "def register():\n"
        "    global registered\n"
        "    if not registered:\n"
        "        merge_methods.register('cart')\n"
        "        registered = True\n"
    )
}


def interpreters() -> list[str]:
    """This Python, and the other supported ones that are on the PATH."""
    others = [f"python3.{minor}" for minor in range(10, 15) if minor != sys.version_info.minor]
    return [
        sys.executable,
        *(
            name
            for name in others
            if shutil.which(name)
            and subprocess.run([name, "-c", ""], capture_output=True).returncode == 0
        ),
    ]


@cache
def _empty(interpreter: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    subprocess.run([interpreter, "-m", "venv", "--without-pip", folder], check=True)
    return folder


class Environment:
    """A virtual environment without pip, changed by writing into its site-packages."""

    def __init__(self, folder: Path, interpreter: str = sys.executable) -> None:
        shutil.copytree(_empty(interpreter), folder, symlinks=True)  # faster than making each
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def install(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    def write(self, files: dict[str, str], folder: Path | None = None) -> None:
        for name, text in files.items():
            path = (folder or self.site) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def add_installed_packages(self) -> None:
        """Let it import what these tests' own Python has: torch, the real mergekit and so on."""
        (self.site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.site.parent,  # not the repository, which would be importable from there
            env=kept | variables,
        )

    def output_of(self, program: str, *options: str, **variables: str) -> str:
        """What a program prints; it must succeed, and print nothing to stderr."""
        done = self.run(*options, "-c", program, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()
