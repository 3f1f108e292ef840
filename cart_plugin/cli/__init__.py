"""The `mergekit-cart` command: one module a subcommand, imported when it is asked for.

The modules are light until their command runs: `mergekit-cart --help` imports neither torch nor
mergekit, and `mergekit-cart doctor` still answers where one of them is missing or broken.
"""

from __future__ import annotations

from importlib import import_module

import click

# subcommand -> the module of this package that defines it, under its own name
_COMMANDS = {
    "compare": "compare",
    "compress": "compress",
    "doctor": "doctor",
    "expand": "expand",
    "inspect": "inspect",
    "merge": "merge",
    "merge-adapters": "merge_adapters",
}


class LazyGroup(click.Group):
    """A click group whose subcommands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of the subcommands."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The subcommand of a name, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"{__name__}.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, _COMMANDS[cmd_name])
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cart-plugin")
def main() -> None:
    """CART for mergekit: merge fine-tuned models around their average.

    Write `merge_method: cart` in a recipe and run `mergekit-cart merge`, or mergekit-yaml.
    """
