"""What a compile tells: progress, tables, JSON and HTML."""
