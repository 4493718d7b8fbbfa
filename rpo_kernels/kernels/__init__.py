"""The token level: kernels over rows of logits, one contract with several backends."""
