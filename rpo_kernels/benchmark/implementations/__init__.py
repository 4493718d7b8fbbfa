"""Compared implementations. registry: interface; ours, plain, peers: implementations; catalogue: lookup by name."""
