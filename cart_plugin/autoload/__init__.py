"""How mergekit finds the plugin: start-up files, and the import hook that they install.

`zzz_cart_plugin.pth` (Python 3.14 and older) and `zzz_cart_plugin.start` (3.15 and newer) are
installed at the top of site-packages; Python reads them when it starts. Both do one thing: call
`hook.install`.
"""


def start() -> None:
    """Install the hook at interpreter start-up; no failure of ours reaches the user's program."""
    try:
        from cart_plugin.autoload import hook

        hook.install("start")
    except Exception:  # noqa: S110 - silent by design: `mergekit-cart doctor` tells
        pass
