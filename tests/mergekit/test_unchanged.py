"""mergekit's own methods stay as they are, and its output free of ours."""

from __future__ import annotations

import json
import logging

import mergekit.merge_methods as methods
import pytest

from tests.mergekit.helpers import execute, matrices

# Runs every method in one process, with the plugin or as if it were not installed.
OTHER_METHODS = """
import hashlib, json, sys
if sys.argv[1] == "without":
    hooks = [f for f in sys.meta_path if type(f).__module__.startswith("cart_plugin")]
    assert hooks, "the plugin's hook is not there to begin with"
    sys.meta_path[:] = [f for f in sys.meta_path if f not in hooks]
import torch
from mergekit import merge_methods
names = sorted(method.spec.name for method in merge_methods.registered_methods())
assert ("cart" in names) == (sys.argv[1] == "with"), names
assert ("cart_plugin.mergekit" in sys.modules) == (sys.argv[1] == "with")
models = [
    {
        "model.embed_tokens.weight": torch.randn(9, 8, generator=g),
        "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8, generator=g),
        "model.norm.weight": torch.randn(8, generator=g),
    }
    for g in [torch.Generator().manual_seed(seed) for seed in range(4)]
]
results = {}
for name in names:
    for count in (1, 2, 3, 4):
        for base in (None, 0):
            spec = merge_methods.get(name).spec
            required = [p for p in spec.parameters if p.required]
            parameters = {p.name: 0.4 for p in required}
            if any(p.name == "density" for p in spec.parameters):
                parameters["density"] = 0.5
            torch.manual_seed(3)
            try:
                merged = merge_methods.merge_state_dicts(
                    models[:count], name, base=base, parameters=parameters
                )
            except Exception as error:
                results[f"{name} {count} {base}"] = type(error).__name__ + str(error)
                continue
            state = b"".join(tensor.contiguous().numpy().tobytes() for tensor in merged.values())
            results[f"{name} {count} {base}"] = hashlib.sha256(state).hexdigest()
print(json.dumps(results))
"""


def test_other_methods_give_the_same_bytes_with_and_without_the_plugin() -> None:
    found = []
    for how in ("with", "without"):
        done = execute("python", "-c", OTHER_METHODS, how)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    with_plugin, without = found
    ours = {key for key in with_plugin if key.startswith(("cart ", "cart_auto "))}
    assert len(ours) == 16
    assert {key: value for key, value in with_plugin.items() if key not in ours} == without
    succeeded = {key.split()[0] for key, value in without.items() if len(value) == 64}
    assert succeeded >= {"linear", "ties", "dare_ties", "slerp", "sce", "model_stock"}


def test_nothing_is_logged_or_printed_by_the_method(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        methods.merge_tensors(matrices(), "cart")
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")
