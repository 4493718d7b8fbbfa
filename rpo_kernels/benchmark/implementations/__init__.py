"""What is compared. registry: what an implementation is; ours, plain, peers: a few lines for each; catalogue: all."""
