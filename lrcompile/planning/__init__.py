"""Which rewrites to make: their prices, what they do to the output, and the choice within a budget."""
