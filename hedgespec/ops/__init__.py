"""The operations: verification, evaluation, linear products and the layers of heads, each with its backends."""
