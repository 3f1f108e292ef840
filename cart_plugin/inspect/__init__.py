"""What fine-tuning did to the weights of several models, and what a merge of them will lose."""

from cart_plugin.inspect.state_dicts import inspect_state_dicts

__all__ = ["inspect_state_dicts"]
