"""Installs the hook when it is imported: for `python -m cart_plugin` and its worker processes."""

from cart_plugin.autoload import hook

hook.install()
