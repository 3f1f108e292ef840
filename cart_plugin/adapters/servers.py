"""Who loads the merged adapter, as far as its form says: the base is not read."""

from __future__ import annotations

from cart_plugin.adapters.selection import TARGETS
from cart_plugin.adapters.work import Merge
from cart_plugin.checkpoints import servers
from cart_plugin.checkpoints.adapters import plain_name
from cart_plugin.checkpoints.servers import Contents, Loader

CONDITION = "if they run LoRA of the base,"
"""What a server has to do besides."""


def loaders(merge: Merge) -> list[Loader]:
    """PEFT, and the servers that take such an adapter, or do not."""
    plan = merge.plan
    turned = bool(plan.common["fan_in_fan_out"])  # GPT-2's Conv1D
    linear, experts, others, heads = [], [], [], []
    for module, shape in plan.shapes.items():
        name = plain_name(module)
        if shape.kind == "experts":
            experts.append(name)
        elif shape.kind != "linear" or turned:
            others.append(name)
        else:
            linear.append(name)
            heads += [] if merge.is_decomposed(module) else [name]
    held = Contents(
        modules=[set(linear)],
        rank=merge.rank,
        whole=[plain_name(name) for name in plan.whole.values()],
        biases=[f"{name}.lora_B.bias" for name in linear + others] if plan.has_bias else [],
        experts=experts,
        others=others,
        has_expression=isinstance(plan.common[TARGETS], str),
        is_causal=plan.common["task_type"] == "CAUSAL_LM",
    )
    unknown = f"LoRA of {heads[0]} has not been tried" if heads else ""
    return servers.loaders(held, lambda _: unknown)
