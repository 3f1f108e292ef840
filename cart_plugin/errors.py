"""What goes wrong in the caller's input."""


class CartError(ValueError):
    """Input that cannot be merged; the message names what was found, where, and what to do."""


class CartWarning(UserWarning):
    """Input that can be merged but will not do what CART is for."""
