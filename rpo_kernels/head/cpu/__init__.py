"""The LM head on CPUs with bfloat16 units: C++ kernels compute tiles of logits in registers (`kernels.native_head`).

A tile's `P = 2^(z - reference)`, z in bits, is 0 at each row's label; the reference is an integer that seldom changes.
Exact: forward sums `P` and `P W` and saves P of the first tiles; backward recomputes P of the others. With a filter:
forward sums P and marks the columns where some row's p may exceed the threshold; backward recomputes P of the marked
columns only. The label's term, `1 - p`, is added to both gradients in float32.
"""
