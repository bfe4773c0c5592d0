"""Drover's control plane: schedules moves and conducts them."""
