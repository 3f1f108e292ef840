"""Which tensors are decomposed, and which are averaged."""

from __future__ import annotations

import pytest
import torch

from cart_plugin import CartSettings, is_decomposed, merge_state_dicts, merge_tensors
from cart_plugin.merging.indexing import index_tensors
from tests.merging.helpers import versions
from tests.support import cart_formula, relative_error

DECOMPOSED = {
    # Llama, Qwen, Mistral
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (16, 64),
    "model.layers.31.mlp.down_proj.weight": (64, 172),
    # Qwen3-MoE: experts stacked, and router
    "model.layers.0.mlp.experts.gate_up_proj": (8, 48, 64),
    "model.layers.0.mlp.experts.down_proj": (8, 64, 24),
    "model.layers.0.mlp.gate.weight": (8, 64),
    "model.layers.0.mlp.experts.3.up_proj.weight": (24, 64),
    # GPT-2
    "transformer.h.0.attn.c_attn.weight": (64, 192),
    "h.11.mlp.c_proj.weight": (256, 64),
    # BERT, RoBERTa
    "bert.encoder.layer.0.attention.self.query.weight": (64, 64),
    "bert.encoder.layer.0.output.dense.weight": (64, 256),
    "bert.pooler.dense.weight": (64, 64),
    "roberta.encoder.layer.11.intermediate.dense.weight": (256, 64),
    # ViT, DINOv2, CLIP
    "vit.encoder.layer.0.attention.attention.key.weight": (64, 64),
    "vit.embeddings.patch_embeddings.projection.weight": (64, 3, 16, 16),
    "encoder.layer.3.mlp.fc1.weight": (256, 64),
    "vision_model.embeddings.patch_embedding.weight": (64, 3, 32, 32),
    "vision_model.encoder.layers.0.self_attn.out_proj.weight": (64, 64),
    "visual_projection.weight": (32, 64),
    # open_clip
    "visual.transformer.resblocks.0.attn.in_proj_weight": (192, 64),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (256, 64),
    "visual.conv1.weight": (64, 3, 32, 32),
    "visual.proj": (64, 32),
    "text_projection": (64, 32),
    # T5
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (128, 64),
    # ConvNeXt, wav2vec 2
    "convnext.encoder.stages.0.layers.0.dwconv.weight": (64, 1, 7, 7),
    "convnext.encoder.stages.0.layers.0.pwconv1.weight": (256, 64),
    "wav2vec2.feature_extractor.conv_layers.1.conv.weight": (32, 32, 3),
    "time_embedding.linear_1.weight": (64, 32),
    "model.diffusion_model.time_embed.0.weight": (64, 32),
    "time_embedding.2.weight": (64, 32),
    "encoder.embedder.input_embedding.weight": (64, 32),
    "decoder.prenet.speaker_embeds_layer.weight": (64, 32),
    "embeddings.xpath_embeddings.xpath_unitseq2_embeddings.weight": (64, 32),
    "decoder.position_embeddings_proj.weight": (64, 32),
    "vision_model.patch_embedding.weight": (64, 3, 4, 4),
    # task heads are linear maps too; recipes leave them out
    "classifier.weight": (10, 64),
}
AVERAGED = {
    "model.embed_tokens.weight": (1000, 64),
    "lm_head.weight": (1000, 64),
    "model.norm.weight": (64,),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.q_norm.weight": (16,),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (8, 48),
    "transformer.wte.weight": (1000, 64),
    "wpe.weight": (128, 64),
    "transformer.h.0.attn.c_attn.bias": (192,),
    "gpt_neox.embed_in.weight": (1000, 64),
    "embed_out.weight": (1000, 64),
    "bert.embeddings.word_embeddings.weight": (1000, 64),
    "bert.embeddings.position_embeddings.weight": (128, 64),
    "bert.embeddings.token_type_embeddings.weight": (2, 64),
    "roberta.encoder.layer.0.output.LayerNorm.weight": (64,),
    "vit.embeddings.cls_token": (1, 1, 64),
    "vit.embeddings.position_embeddings": (1, 197, 64),
    "dinov2.embeddings.mask_token": (1, 64),
    "encoder.layer.0.layer_scale1.lambda1": (64,),
    "vision_model.embeddings.class_embedding": (64,),
    "vision_model.embeddings.position_embedding.weight": (50, 64),
    "text_model.embeddings.token_embedding.weight": (1000, 64),
    "visual.class_embedding": (64,),
    "visual.positional_embedding": (50, 64),
    "positional_embedding": (77, 64),
    "token_embedding.weight": (1000, 64),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (192,),
    "logit_scale": (),
    "pos_embed": (1, 197, 64),
    "shared.weight": (1000, 64),
    "encoder.embed_tokens.weight": (1000, 64),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
    "convnext.encoder.stages.0.layers.0.layer_scale_parameter": (64,),
    "model.decoder.embed_positions.weight": (128, 64),
    "model.embed_tokens_per_layer.weight": (1000, 64),
    "deberta.encoder.rel_embeddings.weight": (512, 64),
    "backbone.embeddings.weight": (1000, 64),
    "cls.predictions.decoder.weight": (1000, 64),
    "qformer.query_tokens": (1, 32, 64),
    "backbone.layers.0.mixer.A_log": (128, 16),
    "layoutlm.embeddings.x_position_embeddings.weight": (128, 64),
    "transformer.positions_embed.weight": (128, 64),
    "transformer.tokens_embed.weight": (1000, 64),
    "transformer.word_embedding.weight": (1000, 64),
    "transformer.layer.0.rel_attn.seg_embed": (2, 4, 16),
    "vision_model.gated_positional_embedding.embedding": (26, 64),
    "vision_model.gated_positional_embedding.tile_embedding.weight": (9, 1664),
    "vision_model.pre_tile_positional_embedding.embedding.weight": (9, 256),
    "tapas.embeddings.token_type_embeddings_3.weight": (2, 64),
    "fine_acoustics.input_embeds_layers.2.weight": (100, 64),
    "yolos.embeddings.detection_tokens": (1, 100, 64),
    "transformer_module.queries_features.weight": (100, 64),
    "layer.with.one.row.weight": (1, 64),
    "layer.with.one.column.weight": (64, 1),
    "layer.with.nothing.weight": (0, 64),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_linear_maps_are_decomposed(name: str) -> None:
    assert is_decomposed(name, DECOMPOSED[name])


@pytest.mark.parametrize("name", AVERAGED)
def test_tables_biases_and_norms_are_averaged(name: str) -> None:
    shape = AVERAGED[name]
    assert not is_decomposed(name, shape)
    tensors = versions(*shape, count=3)
    merged = merge_tensors(tensors, CartSettings(lambda_=9.0), name=name)
    assert torch.allclose(merged, torch.stack(tensors).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_per_layer.weight",
        "deberta.encoder.rel_embeddings.weight",
        "query_tokens",
        "backbone.layers.0.mixer.A_log",
        "backbone.embeddings.weight",
        "cls.predictions.decoder.weight",
    ],
)
def test_tables_by_other_names_are_averaged(name: str) -> None:
    assert not is_decomposed(name, (64, 32))


def test_without_a_name_the_shape_decides() -> None:
    assert is_decomposed(None, (4, 5))
    assert is_decomposed(None, (2, 4, 5))
    assert not is_decomposed(None, (5,))
    assert not is_decomposed(None, ())
    assert not is_decomposed(None, (1, 5))


def test_callers_may_decide_what_is_decomposed() -> None:
    tensors = versions(8, 9)
    name = "model.embed_tokens.weight"
    average = torch.stack(tensors).mean(0)
    forced = merge_tensors(tensors, name=name, decompose=True)
    assert relative_error(forced, cart_formula(tensors, 1)) <= 1e-5
    assert torch.allclose(merge_tensors(tensors, name="q.weight", decompose=False), average)
    state_dicts = [{"q.weight": tensor} for tensor in tensors]
    merged = merge_state_dicts(state_dicts, decompose=lambda name, shape: False)
    assert torch.allclose(merged["q.weight"], average)


def test_scalars_can_be_decomposed_as_anything_else() -> None:
    scalars = [torch.tensor(float(value)) for value in (1, 2, 6)]
    for settings in (CartSettings(), CartSettings(lambda_="auto")):
        merged = merge_tensors(scalars, settings, name="logit_scale", decompose=True)
        assert merged.shape == ()
        assert torch.isfinite(merged)
    assert index_tensors(scalars, decompose=True).restored(2) == 6
