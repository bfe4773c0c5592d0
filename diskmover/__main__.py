"""`diskmover`, or `python -m diskmover`: the mover as a tool of its own."""

from __future__ import annotations

from diskmover.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
