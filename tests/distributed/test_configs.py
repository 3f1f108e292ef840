"""The cluster that the guide starts is one for Ray."""

import shlex
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from benchmarks.readme import ROOT


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "configs" / "ray" / "cluster.yaml").read_text())


def test_the_launcher_takes_the_cluster(cluster: dict) -> None:
    """What `ray up` does before it reaches for the first machine."""
    prepared = prepare_config(cluster)
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == 3


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_knows_the_options_that_machines_are_started_with(cluster: dict, kind: str) -> None:
    *_, last = cluster[f"{kind}_start_ray_commands"]
    program, command, *options = shlex.split(last.rpartition(";")[2])
    assert (Path(program).name, command) == ("ray", "start")
    found = start.make_context("ray start", options)  # reads them, and starts nothing
    assert found.params["head"] is (kind == "head")
    assert (found.params["address"] is None) is (kind == "head")
