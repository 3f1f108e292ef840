"""What goes wrong in the caller's input."""


class CartError(ValueError):
    """Input that cannot be merged; the message names what was found, where, and what to do."""


class CheckpointError(CartError):
    """A model's files that cannot be read or merged, as a fact and what to do about it."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}; {advice}")
        self.fact = fact
        self.advice = advice


class CartWarning(UserWarning):
    """Input that can be merged but will not do what CART is for."""


def first_line(error: BaseException) -> str:
    """An error as one line without a traceback: its type and the start of its message."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
