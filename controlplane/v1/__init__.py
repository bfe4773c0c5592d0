"""Generated from proto/controlplane/v1; see `make proto`."""
