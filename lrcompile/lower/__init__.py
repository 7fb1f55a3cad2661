"""Lowering of lifted graphs to what a device can hold."""
