"""Benchmarks: what `rpo-kernels bench` and `rpo-kernels memory` run.

problem, models      what is measured
inputs, truth        its tensors, and what they give in float64
implementations/     what is compared
results, machine     the result file
references, sampling, peaks, allocations, timing, measure     how it is measured, from one sample to the run
compare, predictions another commit beside this one; what the planner foresees
tables, charts       what is shown
bench, memory        the commands, which import torch when they need it; arguments: what both take
"""
