r"""What fine-tuning did to the models of a pool, and what merges of them will lose.

The report of `mergekit-cart inspect`, saved beside the program's log; nothing is merged::

    fusion_bench method=cart/analysis \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, LazyStateDict, LightningFabricMixin
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn
from tqdm.auto import tqdm

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.base import as_pool, refuse_saving
from cart_plugin.fusion_bench.fleet import check_lazy, module_of, state_of, turned_of
from cart_plugin.inspect.report import Report
from cart_plugin.inspect.state_dicts import records_of
from cart_plugin.merging.inputs import check_same_tensors, check_whole_weights

log = logging.getLogger(__name__)


class CartAnalysisAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """How far the models of a pool moved, where, how alike they are, and what merges keep of them.

    Takes differences from the pool's pretrained model, or from the average without one.

    Args:
        output_path: folder of report.json, report.md and report.html; the program's log folder if
            None.
        **kwargs: those of `BaseAlgorithm`.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {"_output_path": "output_path"}

    def __init__(self, output_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._output_path = output_path

    @property
    def output_path(self) -> Path:
        """The report's folder.

        Raises:
            CartError: none is given, and there is no log.
        """
        found = self._output_path
        if found is None and self.fabric.loggers:
            found = self.fabric.logger.log_dir
        if found is None:
            raise CartError("give output_path, the folder of the report: there is no log folder")
        return Path(found)

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> Any:
        """Measure the models of a pool, and write the report.

        Returns:
            The pretrained model or, without one, the first: methods have to return a model.

        Raises:
            CartError: fewer than two models, or such as cannot be merged; or the program is told to
                save what is merged.
        """
        started = time.perf_counter()
        refuse_saving(self, "cart/analysis merges nothing")
        out = self.output_path
        pool = as_pool(modelpool)
        models = {name: pool.load_model(name) for name in pool.model_names}
        base = pool.load_pretrained_model() if pool.has_pretrained else None
        check_lazy(models)
        device = self.fabric.device
        named = {name: _OnDevice(model, device) for name, model in models.items()}
        if len(named) > 1:  # fewer are refused below
            check_same_tensors(named)
            check_whole_weights(named)
        # An empty pool is refused below.
        total = len(next(iter(named.values()), ()))
        records = records_of(
            named,
            base=None if base is None else _OnDevice(base, device),
            turned=turned_of(next(iter(models.values()), base)),
        )
        report = Report(
            models=dict(zip(named, named, strict=True)),
            base=None if base is None else "_pretrained_",
            merged=None,
            key="",
            of_adapters=False,
            of_pool=True,
            records=list(tqdm(records, desc="measuring", total=total, dynamic_ncols=True)),
            seconds=time.perf_counter() - started,
        )
        out.mkdir(parents=True, exist_ok=True)
        report.write(out)
        log.info("report: %s", out / "report.html")
        one = next(iter(models.values())) if base is None else base
        # FusionBench prints what comes back, and a lazy state dict has no end then.
        has_class = isinstance(one, LazyStateDict) and one.meta_module_class is not None
        return module_of(one, one.dtype) if has_class else one


class _OnDevice(Mapping[str, Tensor]):
    """A model's tensors, each moved when it is asked for."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._state = state_of(model)
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._state[name]
        return found.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
