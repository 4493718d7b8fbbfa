"""Benchmarks and memory profiling: what `rpo-kernels bench` and `rpo-kernels memory` run.

models -> problem (inputs, float64 truth) -> providers, peers (what is compared) -> timing, memory (how it is measured)
-> bench, capacity (what is run) -> reports, charts (what is shown).
"""
