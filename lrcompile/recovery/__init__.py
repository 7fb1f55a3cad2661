"""Recovery: training that gives back what rewrites lost."""
