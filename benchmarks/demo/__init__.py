"""`make demo`: CART beside other methods on four image tasks, in minutes."""
