"""The import hook that registers `cart` as soon as mergekit's merge methods exist.

Every Python process of the environment runs `install` at start-up, so this file imports nothing
that is not there already, and nothing of it may ever raise: what fails is kept for `status`, and
`mergekit-cart doctor` prints it.
"""

import sys

TYPE_CHECKING = False  # type checkers know the name; `typing` itself would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

METHODS = "mergekit.merge_methods"
GENOME = "mergekit.evo.genome"
ADAPTER = "cart_plugin.mergekit"


class Status:
    """What the hook has done in this process.

    Attributes:
        route: who called `install` first: "pth", "start" or "explicit"; None if nobody did.
        installed: the finder is in `sys.meta_path`.
        registered: `cart_plugin.mergekit.register` has run without an error.
        error: tracebacks of what failed, empty if nothing did.
    """

    def __init__(self, route: "str | None", installed: bool, registered: bool, error: str) -> None:
        self.route = route
        self.installed = installed
        self.registered = registered
        self.error = error

    def __repr__(self) -> str:
        return (
            f"Status(route={self.route!r}, installed={self.installed}, "
            f"registered={self.registered}, error={self.error!r})"
        )


class _Loader:
    """Stands in for a module's own loader until the module has executed, then follows up.

    Everything but `exec_module` is the own loader's, which is also put back before the module's
    code runs: mergekit and importlib.resources never meet this class.
    """

    def __init__(self, loader: "Loader", follow_up: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._follow_up = follow_up

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = self._loader  # type: ignore[unreachable]
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)  # outside any try: mergekit's own errors pass
        _attempt(self._follow_up, module)


class _Finder:
    """Finds nothing itself: asks the finders behind it, and has their loader followed up.

    It stays in `sys.meta_path`: taking it out would shift the list under another thread that is
    walking it, and staying costs one dictionary look-up an import.
    """

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        follow_up = _FOLLOW_UPS.get(fullname)
        if follow_up is None:
            return None
        finders = iter(tuple(sys.meta_path))
        for finder in finders:
            if finder is self:
                break
        for finder in finders:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, follow_up)  # type: ignore[assignment, arg-type]
                return spec
        return None


_finder = _Finder()
_route: "str | None" = None
_registered = False
_errors: "dict[str, str]" = {}


def install(route: str = "explicit") -> None:
    """Watch for mergekit's modules from now on; those already imported are served at once.

    Calling it again does nothing but retry what failed. `status` names the first call's `route`.
    """
    global _route
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if _route is None:
        _route = route
    for name, follow_up in _FOLLOW_UPS.items():
        module = sys.modules.get(name)
        if module is not None:
            _attempt(follow_up, module)


def status() -> Status:
    """Tell what the hook has done in this process, for `mergekit-cart doctor` and for tests."""
    return Status(_route, _finder in sys.meta_path, _registered, "\n".join(_errors.values()))


def _attempt(follow_up: "Callable[[ModuleType], None]", module: "ModuleType") -> None:
    """Run a follow-up; keep its traceback instead of letting it out."""
    try:
        follow_up(module)
    except Exception:
        import traceback

        _errors[follow_up.__name__] = traceback.format_exc()
    else:
        _errors.pop(follow_up.__name__, None)


def _register(module: "ModuleType") -> None:
    """Call the adapter's `register`, once both mergekit's methods and the adapter have executed."""
    global _registered
    if METHODS not in sys.modules:
        return
    from importlib import import_module

    adapter = import_module(ADAPTER)
    if adapter is not module and getattr(adapter.__spec__, "_initializing", False):
        # It is importing mergekit itself, here or in another thread; its own follow-up registers.
        return
    adapter.register()
    _registered = True


def _allow_evolution(genome: "ModuleType") -> None:
    """Let mergekit-evolve tune the models' weights: its table of methods is fixed."""
    for name in ("cart", "cart_auto"):
        genome.METHOD_PARAM_MAPS.setdefault(name, ["weight"])


_FOLLOW_UPS: "dict[str, Callable[[ModuleType], None]]" = {
    METHODS: _register,
    ADAPTER: _register,
    GENOME: _allow_evolution,
}
