"""A worker's process: its start, its parts, its background jobs and its end."""
