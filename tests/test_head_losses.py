"""linear_rpo_loss is rpo_loss."""

import pytest
import torch

from head_cases import make, sparse
from rpo_kernels import RPO, SimPO, linear_rpo_loss, rpo_loss

pytestmark = pytest.mark.usefixtures("small_tiles")
INTERPRETED = False


@pytest.mark.parametrize("objective", [RPO(), RPO("sq"), SimPO()], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "ragged", "stacked"])
def test_linear_rpo_loss_is_rpo_loss(layout, objective):
    """To rounding in float64, gradients included, with every way of giving the reference."""
    hidden, weight, bias, labels = make((4, 8), dtype=torch.float64, bias=True)
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, generator=generator)
    ref_hidden = torch.randn(4, 8, 10, generator=generator).double()
    ref_weight = torch.randn(700, 10, generator=generator).double().requires_grad_()
    options = dict(objective=objective, shift=True, softcap=9.0, token_weights=torch.rand(4, 8, generator=generator))
    if layout == "packed":
        hidden, labels, ref_hidden = (x.detach().flatten(0, 1) for x in (hidden, labels, ref_hidden))
        hidden.requires_grad_()
        options["cu_seqlens"] = torch.tensor([0, 3, 16, 16, 32])
        options["token_weights"] = options["token_weights"].flatten()
    elif layout == "ragged":
        options["group_ids"] = [0, 1, 1, 1]
    elif layout == "stacked":
        options["layout"] = layout
    if objective.reference_free:
        references = [({}, {})]
    else:
        references = [
            (dict(ref_logps=-torch.rand(4, generator=generator)),) * 2,
            (
                dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=bias.detach()),
                dict(ref_logits=ref_hidden @ ref_weight.T + bias.detach()),
            ),
            (dict(ref_hidden=hidden.detach() / 2), dict(ref_logits=hidden.detach() / 2 @ weight.T + bias)),
        ]
    for of_hidden, of_logits in references:
        mine = linear_rpo_loss(hidden, weight, labels, rewards, bias=bias, **of_hidden, **options)
        plain = rpo_loss(hidden @ weight.T + bias, labels, rewards, **of_logits, **options)
        assert mine.dropped is None
        for name, x, y in zip(mine._fields, mine, plain):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=name)
        for x, y in zip(
            torch.autograd.grad(mine.loss, (hidden, weight, bias)),
            torch.autograd.grad(plain.loss, (hidden, weight, bias)),
        ):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert ref_weight.grad is None


def test_linear_rpo_loss_reports_what_the_filter_dropped(backend, backend_device):
    hidden, weight, bias, labels = sparse(backend_device)
    rewards, ref = torch.randn(4, device=backend_device), torch.zeros(4, device=backend_device)
    out = linear_rpo_loss(
        hidden, weight, labels, rewards, bias=bias, ref_logps=ref, gradient_filter=2**-7, backend=backend
    )
    assert out.dropped.shape == labels.shape and (out.dropped > 0).any() and not out.dropped[labels == -100].any()
