"""The gRPC API: thin servicers over the store, the rules, the scheduler and the sagas."""
