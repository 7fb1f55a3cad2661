"""Quantisation: a compiled model in 8-bit integers, and what that does to the limits of a budget."""
