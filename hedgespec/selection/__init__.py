"""Selection and learning of one request: draws, arms, costs, the delay queue, and the selector that joins them."""
