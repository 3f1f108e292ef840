"""Weights of a centre and of what tasks add to it, on devices that tests have not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("fusion_bench")

from torch import Tensor, nn

from cart_plugin import CartSettings
from cart_plugin.fusion_bench import merged
from cart_plugin.fusion_bench.merged import LowRankTerm, Merged, Term, Whole
from cart_plugin.merging.directions import directions_of


def versions(seed: int = 0) -> list[Tensor]:
    return list(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(seed)))


def terms() -> list[Term]:
    found = directions_of(versions(), CartSettings(rank=1), candidates=1.0)
    whole = Whole(torch.zeros(6, 4), versions(), torch.float16)
    return [whole, *(LowRankTerm(found, torch.float16, masked=masked) for masked in (False, True))]


@pytest.mark.parametrize("term", terms(), ids=["whole", "low-rank", "masked"])
def test_coefficients_come_to_where_the_tensors_are(
    term: Term, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without adaptation nothing moves them: models may be on a GPU all the same."""
    monkeypatch.setattr(merged, "full_precision", lambda device: nullcontext())  # not on meta
    weight = term.to("meta")(torch.ones(3))
    assert (weight.device.type, weight.dtype, weight.shape) == ("meta", torch.float16, (6, 4))


class OnApplesGPU(Tensor):
    """A tensor that acts as one on a device without fp64."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("term", terms(), ids=["whole", "low-rank", "masked"])
def test_sizes_are_taken_where_there_is_no_fp64(term: Term) -> None:
    expected = Merged(nn.Linear(4, 6, bias=False), {"weight": term}, [1.0] * 3, "task").sizes
    assert (expected.dtype, expected.shape) == (torch.float64, (4, 1))
    for name, buffer in term.named_buffers():
        if buffer.is_floating_point():
            setattr(term, name, buffer.as_subclass(OnApplesGPU))
    found = Merged(nn.Linear(4, 6, bias=False), {"weight": term}, [1.0] * 3, "task").sizes
    assert type(found) is Tensor
    assert torch.equal(found, expected)
