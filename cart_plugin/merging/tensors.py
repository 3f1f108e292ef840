"""What kind of tensor a weight is: whether it is decomposed, and as which matrices."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

# Tables that are looked up by token or position, whatever the architecture calls them, and
# biases that a stack of experts makes two-dimensional. Their rows are not directions of a linear
# map, so the paper's argument (and the authors' code) leaves them to the average.
_AVERAGED_NAME = re.compile(
    r"(?:^|\.)(?:"
    r"embed_tokens(?:_per_layer)?|tok_embeddings|word_embeddings|token_embeddings?|"
    r"token_type_embeddings|rel_embeddings|"
    r"embed_in|embed_out|lm_head|wte|wpe|"
    r"(?:absolute_)?position_embeddings?|positional_embedding|pos_embed|embed_positions|"
    r"relative_attention_bias|relative_position_bias_table|rel_pos_[hw]|"
    r"(?:cls|class|mask|register|distillation)_(?:token|embedding)s?"
    r")(?:\.|$)"
    r"|(?:^|\.)embeddings\.weight$|^(?:\w+\.)?shared\.weight$|predictions\.decoder\.weight$"
    r"|(?:^|\.)(?:query_tokens|A_log)$"
    r"|bias$"
)
# The same by names that only single architectures have, each told apart from layers that are called
# alike: patch and time embeddings are linear maps, an `input_embedding` may be one.
_TABLE_NAME = re.compile(
    r"(?:^|\.)(?:"
    r"(?:\w+_)?(?:position|positional|token_type|word|entity|ngram|seg|level)_embed(?:ding)?s?"
    r"(?:_layer|_\d+)?(?:\.(?:tile_)?embedding)?|"
    r"(?:language|speaker|unit)_embedding|time_embeddings|"
    r"xpath_(?:tag|subs)_sub_embeddings\.\d+|input_embeds_layer(?:s\.\d+)?|"
    r"tokens_embed|positions_embed|embed_timestep|queries_(?:embedder|features)|"
    r"detection_tokens|group_token|mask_emb|HashBucketCodepointEmbedder_\d+)(?:\.weight)?$"
)
_CONVOLUTION_NAME = re.compile(r"conv", re.IGNORECASE)


def is_decomposed(name: str | None, shape: Sequence[int]) -> bool:
    """Whether CART decomposes a tensor, rather than averaging it.

    Args:
        name: the tensor's name in its checkpoint; None if it has none (its shape decides).
        shape: the tensor's shape.

    Returns:
        True for matrices, stacks of matrices (experts) and convolution kernels; False for
        vocabulary and position tables, biases, norms and whatever has no two sides above 1.
    """
    if name is not None and (_AVERAGED_NAME.search(name) or _TABLE_NAME.search(name)):
        return False
    return len(shape) >= 2 and 0 not in shape and min(matrix_shape(name, shape)[1:]) > 1


def matrix_shape(name: str | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape ``(stack, m, n)`` of the matrices that a tensor of two or more dimensions holds.

    Convolution kernels ``(out, in, ...)`` are one matrix ``(out, in * ...)``; what else has three
    dimensions is a stack, such as the experts of a mixture.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3 and not (name is not None and _CONVOLUTION_NAME.search(name)):
        return shape[0], shape[1], shape[2]
    # A scalar is a matrix of one number, wherever somebody wants it decomposed.
    return 1, math.prod(shape[:1]), math.prod(shape[1:])


def tensor_seed(seed: int, name: str) -> int:
    """The solver's start: the same in every process and order of work, another for each tensor."""
    return (seed + zlib.crc32(name.encode())) % 2**63
