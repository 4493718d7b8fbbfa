"""Sequences of calls, forward and backward, while global state changes in between: each result is the oracle's."""

import contextlib

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule

from rpo_kernels import RPO, linear_token_logprobs, rpo_loss, token_logprobs

from . import contexts, oracle

VOCAB, WIDTH = 37, 8
FAMILY = dict(distance="bwd_kl", beta=1.0, eta=0.5)
MEMBERS = [[0, 1], [2, 3]]


class Graph:
    """A result whose backward is still to come, perhaps several times."""

    def __init__(self, value, leaves, expected, exact_leaves):
        self.value, self.leaves = value, leaves
        self.tolerance = 3e-5 if leaves[0].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=1e-4, atol=2e-4)
        self.factors = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        self.gradients = torch.autograd.grad(expected, exact_leaves, self.factors, allow_unused=True)

    def backward(self, retain):
        factors = self.factors.to(self.value.dtype)
        got = torch.autograd.grad(self.value, self.leaves, factors, retain_graph=retain, allow_unused=True)
        self.check(got, 1)
        return got

    def check(self, got, times):
        for mine, exact in zip(got, self.gradients):
            assert mine.isfinite().all()
            error, size = (mine.double() - times * exact).norm(), times * exact.norm()
            assert error <= self.tolerance * (size + times * self.factors.norm()), f"{error} of {size}"


class Calls(RuleBasedStateMachine):
    """Graphs that begin under one state of torch and end under another."""

    graphs, kept = Bundle("graphs"), Bundle("kept")

    @initialize()
    def remember(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(contexts.default_dtype(torch.get_default_dtype()))
        self.stack.callback(torch.set_num_threads, torch.get_num_threads())
        self.stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        self.stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", True)

    def teardown(self):
        self.stack.close()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    def set_default_dtype(self, dtype):
        torch.set_default_dtype(dtype)

    @rule(threads=st.integers(1, 4))
    def set_threads(self, threads):
        torch.set_num_threads(threads)

    @rule(precision=st.sampled_from(["highest", "high", "medium"]))
    def set_matmul_precision(self, precision):
        torch.set_float32_matmul_precision(precision)

    @rule(fill=st.booleans())
    def fill_memory(self, fill):
        torch.utils.deterministic.fill_uninitialized_memory = fill

    @rule(
        target=graphs,
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        backend=st.sampled_from(["native", "torch"]),
        inplace=st.booleans(),
    )
    def begin_logits(self, seed, dtype, backend, inplace):
        logits, labels = self.draw_logits(seed, dtype)
        leaf, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
        value = token_logprobs(leaf * 1, labels, inplace_backward=inplace, backend=backend)
        graph = Graph(value, [leaf], oracle.token_outputs(exact, labels)["logps"], [exact])
        graph.once = inplace
        return graph

    @rule(
        target=graphs,
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        budget=st.sampled_from([0, 2**14, "1MB"]),
        entropy=st.booleans(),
    )
    def begin_head(self, seed, dtype, budget, entropy):
        generator = torch.Generator().manual_seed(seed)
        leaves = [
            torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in ((6, WIDTH), (VOCAB, WIDTH))
        ]
        leaves = [x.to(dtype).requires_grad_() for x in leaves]
        labels = torch.randint(VOCAB, (6,), generator=generator)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = oracle.token_outputs(exact[0] @ exact[1].T, labels)
        name = "entropy" if entropy else "logps"
        out = linear_token_logprobs(*leaves, labels, memory_budget=budget, outputs=("entropy",))
        graph = Graph(getattr(out, name), leaves, expected[name], exact)
        graph.once = False
        return graph

    @rule(target=graphs, seed=st.integers(0, 10**6), backend=st.sampled_from(["native", "torch"]))
    def begin_loss(self, seed, backend):
        logits, labels = self.draw_logits(seed, torch.float32)
        rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float32)
        leaf, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
        value = rpo_loss(
            leaf * 1, labels, rewards, objective=RPO(**FAMILY, reference_free=True), backend=backend
        ).group_losses
        sums = oracle.token_outputs(exact, labels)["logps"].sum(-1)
        expected = oracle.preference_loss(sums, None, [5] * 4, rewards.double(), MEMBERS, FAMILY)[1]
        graph = Graph(value, [leaf], expected, [exact])
        graph.once = False
        return graph

    @rule(target=kept, graph=consumes(graphs))
    def end_retaining(self, graph):
        return graph, graph.backward(retain=True)

    @rule(pair=consumes(kept))
    def end_again(self, pair):
        graph, first = pair
        if graph.once:
            try:
                graph.backward(retain=False)
            except RuntimeError as error:
                assert contexts.MODIFIED in str(error)
        else:
            for one, other in zip(first, graph.backward(retain=False)):
                torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)

    @rule(graph=consumes(graphs))
    def end_accumulating(self, graph):
        for leaf in graph.leaves:
            leaf.grad = torch.zeros_like(leaf)
        graph.value.backward(graph.factors.to(graph.value.dtype))
        graph.check([leaf.grad for leaf in graph.leaves], 1)

    @rule(seed=st.integers(0, 10**6), manager=st.sampled_from([torch.no_grad, torch.inference_mode]))
    def evaluate(self, seed, manager):
        logits, labels = self.draw_logits(seed, torch.float32)
        with manager():
            value = token_logprobs(logits, labels)
            assert not value.requires_grad
        expected = oracle.token_outputs(logits.double(), labels)["logps"]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)

    @staticmethod
    def draw_logits(seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        logits = 4 * torch.randn(4, 5, VOCAB, generator=generator, dtype=torch.float32)
        return logits.to(dtype), torch.randint(VOCAB, (4, 5), generator=generator)


TestCalls = Calls.TestCase
PROFILE = settings.get_profile("fuzz")
TestCalls.settings = settings(PROFILE, max_examples=max(1, PROFILE.max_examples // 2), stateful_step_count=15)
