"""The converted backbone computes what the ONNX file computes."""

import numpy as np
import pytest
import torch

from benchmarks.common.sources import fetch
from benchmarks.vision import backbone


@pytest.mark.slow
def test_the_encoder_agrees_with_the_onnx_run(tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    source = fetch([backbone.SOURCE])[backbone.SOURCE.name] / backbone.ONNX_FILE
    graph = onnx.load(source)
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    path = tmp_path / "backbone.onnx"
    onnx.save(graph, path)
    images = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run([last], {"input_image": images})
    with torch.no_grad():
        found = backbone.load_onnx(source)(torch.from_numpy(images)).last_hidden_state.numpy()
    assert found.shape == expected.shape == (1, 257, 384)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_the_prepared_folder_holds_every_tensor_under_its_name():
    from transformers import Dinov2Model

    from benchmarks.common.recipes import tensor_shapes

    found = tensor_shapes(backbone.prepare_backbone())
    expected = {k: tuple(v.shape) for k, v in Dinov2Model(backbone.config()).state_dict().items()}
    assert len(found) == 223
    assert found == expected
