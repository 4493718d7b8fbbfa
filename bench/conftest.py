"""Sizes of the pytest-benchmark suite: small by default, so that it runs within minutes on two cores."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("rpo_kernels")
    group.addoption("--rows", type=int, default=64, help="scored tokens")
    group.addoption("--vocab", type=int, default=32000, help="vocabulary")
    group.addoption("--hidden", type=int, default=256, help="width of the hidden states")
    group.addoption("--responses", type=int, default=2, help="responses a prompt")
    group.addoption("--dtype", default="bfloat16", help="of logits, hidden states and weight")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
