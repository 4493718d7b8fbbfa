"""The verl integration against verl's own code, where it is installed; of verl it needs no more than two files.

Tried with verl 0.9.1.
"""

import pytest
import torch

verl = pytest.importorskip("verl.utils.torch_functional", exc_type=ImportError)
fused = pytest.importorskip("verl.utils.experimental.torch_functional", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_functions_are_verls_but_closer_to_float64(dtype):
    from rpo_kernels.integrations.verl import patch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 50, 64, generator=generator).to(dtype).requires_grad_()
    weight = (0.2 * torch.randn(3000, 64, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(3000, (2, 50), generator=generator)

    def results(function):
        logps, entropy = function()
        loss = (logps * logps.detach()).sum() - 0.01 * entropy.sum()
        return [x.detach().double() for x in (logps, entropy, *torch.autograd.grad(loss, (hidden, weight)))]

    def exact():
        all_logps = (hidden.double() @ weight.double().T / 0.9).log_softmax(-1)
        entropy = -(all_logps.exp() * all_logps).sum(-1)
        return all_logps.gather(-1, labels[..., None]).squeeze(-1), entropy

    def of_verl():
        return fused.FusedLinearForPPO()(hidden, weight, labels, temperature=0.9)

    wanted = results(exact)
    patch().undo()
    theirs = results(of_verl)
    with patch():
        ours = results(of_verl)
        logits = (hidden.float() @ weight.float().T).detach()
        on_logits = verl.logprobs_from_logits(logits, labels, inplace_backward=False)
    torch.testing.assert_close(on_logits, logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1))
    for a, b, c in zip(ours, theirs, wanted):
        assert (a - c).norm() <= (b - c).norm() * 1.5 + 1e-6 * c.norm()
