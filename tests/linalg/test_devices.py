"""What the solvers do on an accelerator: nothing of the CPU is mixed in, and it rarely waits.

On a simulated one (`tests.devices`), whose numbers are those of the CPU, in a process of its own:
torch does not forget a device. `make bench-gpu` runs the other tests on a real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cart_plugin import CartSettings, RankRule
from cart_plugin.linalg import spectra
from cart_plugin.linalg import svd as solvers
from cart_plugin.linalg.svd import SOLVERS
from cart_plugin.merging import cart
from tests.devices import CHOSEN, DEVICE, waits
from tests.linalg.helpers import EXACT_BAR
from tests.support import best_approximation, power_law, random, relative_error, with_spectrum


@pytest.mark.slow
@pytest.mark.skipif(CHOSEN != "cpu", reason="is in that process")
def test_what_follows_holds_on_a_simulated_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    named = {**os.environ, "CART_TEST_DEVICE": "simulated", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=named, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.fixture
def device() -> torch.device:
    if CHOSEN != "simulated":
        pytest.skip("in a process of its own, by the first test")
    return DEVICE


def test_tensors_of_two_devices_do_not_mix(device: torch.device) -> None:
    there = torch.ones(3).to(device)
    assert there.device.type == "simulated"
    assert (there + 1).cpu().tolist() == [2, 2, 2]
    for mixed in (lambda: there + torch.ones(3), lambda: torch.stack([there[0], torch.ones(())])):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("svd", SOLVERS)
def test_solvers_stay_on_the_device(svd: str, stack: int, device: torch.device) -> None:
    x = torch.stack([with_spectrum(power_law(240, 1), 240, 280, seed=9 * n) for n in range(stack)])
    for rule in (RankRule(rank=16), RankRule(energy=0.6), RankRule(0.1, of_numerical_rank=True)):
        found = solvers.truncated_svd(x.to(device), rule, svd=svd)
        assert {part.device.type for part in (found.U, found.S, found.Vh)} == {"simulated"}
        if svd == "exact":
            best = best_approximation(x, found.rank)
            assert relative_error(found.dense().cpu(), best) <= EXACT_BAR


@pytest.mark.parametrize("k", [9, 60])
def test_eigenproblems_are_in_fp64_there(
    k: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("eigh", "svd"):
        inner = getattr(torch.linalg, name)

        def noted(x: Tensor, *args: Any, name: str = name, inner: Any = inner, **named: Any) -> Any:
            asked.append((name, x.dtype))
            return inner(x, *args, **named)

        monkeypatch.setattr(torch.linalg, name, noted)
    x = with_spectrum(power_law(80, 1), 80, 90)
    found = solvers.truncated_svd(x.to(device), RankRule(rank=k), svd="exact")
    assert set(asked) == {("eigh", torch.float64)}
    assert found.U.dtype == torch.float32
    assert relative_error(found.dense().cpu(), best_approximation(x, k)) <= EXACT_BAR


@pytest.mark.parametrize("svd", SOLVERS)
def test_a_seed_gives_the_same_again(svd: str, device: torch.device) -> None:
    x = random(200, 240).to(device)
    one, two = (
        solvers.truncated_svd(x, RankRule(rank=9), svd=svd, seed=3).U.cpu() for _ in range(2)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "settings",
    [
        CartSettings(),
        CartSettings(energy=0.5),
        CartSettings(lambda_="auto", svd="exact"),
        CartSettings(lambda_="auto", center="average", svd="exact"),
    ],
)
def test_merging_stays_on_the_device(settings: CartSettings, device: torch.device) -> None:
    tensors = [random(96, 120, seed=n).to(device) for n in range(4)]
    base = random(96, 120, seed=9).to(device)
    for start in (base, None):
        merged = cart.merge_tensors(tensors, settings, base=start, name="a.weight")
        assert merged.device.type == "simulated"
        here = [tensor.cpu() for tensor in tensors]
        own = None if start is None else start.cpu()
        expected = cart.merge_tensors(here, settings, base=own, name="a.weight")
        assert relative_error(merged.cpu(), expected) < 1e-2


def test_spectra_come_to_the_cpu(device: torch.device) -> None:
    x = random(2, 30, 40)
    assert torch.allclose(spectra.spectrum(x.to(device)), spectra.spectrum(x))


@pytest.mark.parametrize(("svd", "most"), [("exact", 8), ("fast", 14), ("sketch", 11)])
def test_the_device_is_rarely_waited_for(svd: str, most: int, device: torch.device) -> None:
    # Each time is tens of microseconds in which nothing is computed: decisions come in few places.
    x = with_spectrum(power_law(512, 0.5), 512, 640).to(device)
    with waits() as counted:
        solvers.truncated_svd(x, RankRule(rank=40), svd=svd)
    assert sum(counted.values()) <= most, counted


def test_what_a_merge_counts_is_asked_for_in_few_places(device: torch.device) -> None:
    tensors = [random(512, 600, seed=n).bfloat16().to(device) for n in range(4)]
    with waits() as counted:
        cart.merge_tensors(tensors, CartSettings(), name="a.weight")
    assert sum(counted.values()) <= 4 * 22, counted
