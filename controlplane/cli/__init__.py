"""The `drover` command: a thin client of the public API."""
