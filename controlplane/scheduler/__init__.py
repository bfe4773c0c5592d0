"""Choosing a host: filters, weighers and a reason for every host. Pure."""
