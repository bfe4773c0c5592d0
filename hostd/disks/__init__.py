"""Disks of machines: where they may lie, what they are, and how they are set aside."""
