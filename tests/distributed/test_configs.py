"""The cluster that the guide starts is one for Ray."""

import json
from pathlib import Path

import jsonschema
import ray
import yaml

from benchmarks.readme import ROOT


def test_rays_schema_takes_the_cluster() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    cluster = yaml.safe_load((ROOT / "configs" / "ray" / "cluster.yaml").read_text())
    jsonschema.validate(cluster, json.loads(schema.read_text()))
