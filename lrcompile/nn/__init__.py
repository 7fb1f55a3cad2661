"""Modules that compiled models contain beside those of torch."""
