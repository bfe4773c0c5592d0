"""The control plane as a process: configuration, ports, start and shutdown."""
