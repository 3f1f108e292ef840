"""Run any mergekit command with `cart` registered, where start-up files are not read.

    python -m cart_plugin mergekit-yaml cart.yaml merged
    python -m cart_plugin doctor

For `python -S`, `PYTHONPATH` and `pip install --target`; elsewhere the commands themselves know
`cart`.
"""

import sys
from importlib import metadata

from cart_plugin.autoload import explicit

# Worker processes started by "spawn" import the main module again, unless it is called __main__:
# under this name they install the hook too.
__spec__ = explicit.__spec__

HELP = "usage: python -m cart_plugin COMMAND [ARGUMENT]..."


def mergekit_commands() -> dict[str, metadata.EntryPoint]:
    """Console scripts of the installed mergekit by name; none if it is not installed."""
    try:
        points = metadata.distribution("mergekit").entry_points
    except metadata.PackageNotFoundError:
        return {}
    return {point.name: point for point in points if point.group == "console_scripts"}


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names with the others; returns the exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    scripts = mergekit_commands()
    if name in scripts:
        return _run_script(name, scripts[name], rest)

    from click import Context

    from cart_plugin.cli import main as cli

    ours = cli.list_commands(Context(cli))
    if name == "mergekit-cart":
        return cli(args=rest, prog_name="python -m cart_plugin mergekit-cart")
    if name in ours:
        return cli(args=arguments, prog_name="python -m cart_plugin")
    available = ", ".join([*sorted(scripts), "mergekit-cart", *ours])
    if name in ("-h", "--help"):
        print(f"{HELP}\ncommands: {available}")
        return 0 if arguments else 2
    print(f"cart_plugin: no command {name!r}; there are: {available}", file=sys.stderr)
    return 2


def _run_script(name: str, script: metadata.EntryPoint, arguments: list[str]) -> int:
    """Run one of mergekit's console scripts as its launcher would."""
    try:
        command = script.load()
    except ImportError as error:
        print(
            f"cart_plugin: {name} cannot be loaded: {error} (see: python -m cart_plugin doctor)",
            file=sys.stderr,
        )
        return 1
    sys.argv = [name, *arguments]
    if hasattr(command, "make_context"):  # click's own guess of its name would have a dot
        return int(command(prog_name=f"python -m cart_plugin {name}") or 0)
    return int(command() or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
