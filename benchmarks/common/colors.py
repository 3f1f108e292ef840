"""Colours of the plots: the same thing looks the same in all of them."""

MERGED_COLOR, CART_COLOR, LIMIT_COLOR = "#9aa5b1", "#1f6feb", "#3d4852"
