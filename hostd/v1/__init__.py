"""Generated from proto/hostd/v1; see `make proto`."""
