"""The token level: kernels over rows of logits, one interface with several backends."""
