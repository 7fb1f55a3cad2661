"""The lifted graph: views of it, edits of it, and whether two of them compute the same."""
