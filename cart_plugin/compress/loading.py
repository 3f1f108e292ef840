"""The base and adapters as one PEFT model, after a look whether they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cart_plugin.checkpoints import names as naming
from cart_plugin.compress.expansion import check_base, tasks
from cart_plugin.compress.inputs import open_model
from cart_plugin.compress.work import ADAPTERS, BASE
from cart_plugin.errors import CartError


def load_peft(
    folder: str | Path, *names: str, base: str | Path | None = None, **options: Any
) -> Any:
    """The base with some of its adapters, as PEFT loads them; the first one is active.

    PEFT itself takes any base of fitting shapes, also one that another compression has written in
    the place of this one.

    Args:
        folder: written by `compress`, wherever it lies now.
        names: of the adapters; all of them if none is given.
        base: folder of the base, if it is not ``folder/base``.
        options: of the base's `from_pretrained`, such as ``dtype`` and ``device_map``.

    Returns:
        A `peft.PeftModel`, in evaluation mode; `set_adapter` switches.

    Raises:
        CartError: there is no such folder or adapter, or an adapter was made for another base.
    """
    from peft import PeftModel

    root = Path(folder)
    known = tasks(root)
    chosen = list(names) or known
    for name in chosen:
        if name not in known:
            raise CartError(f"{root} has no task {name!r}; it has {', '.join(known)}")
    place = root / BASE if base is None else Path(base)
    stored = open_model(place, f"the base of {root}")
    for name in chosen:
        check_base(root / ADAPTERS / name, name, stored)
    model = naming.model_class(stored.config, stored.name).from_pretrained(place, **options)
    first, *others = chosen
    found = PeftModel.from_pretrained(model, root / ADAPTERS / first, adapter_name=first)
    for name in others:
        found.load_adapter(root / ADAPTERS / name, adapter_name=name)
    found.set_adapter(first)
    return found.eval()
