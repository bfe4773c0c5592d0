"""Drover's terms and rules, without I/O: data in, data or an error out."""
