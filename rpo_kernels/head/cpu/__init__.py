"""The walk on CPUs with bfloat16 units: tiles of logits made, used and forgotten in C++ (`kernels.native_head`).

A tile gives `P = 2^(z - reference)`, z in bits, 0 at each row's label; the reference is an integer that seldom moves.
Exact: forward adds up `P` and `P W` and keeps P of the first tiles; backward makes the others' again. With a filter:
forward adds up P and marks the columns where some row's p may exceed the threshold, backward makes P of the marked
columns alone. The label's own part, `1 - p`, is added to both gradients in float32.
"""
