"""What a compile tells: progress, tables, JSON and a page for a browser."""
