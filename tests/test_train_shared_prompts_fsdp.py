"""Shared prompts under FSDP2: two processes with different rows give the loss and gradients of one."""

import socket
import sys

import pytest
import torch
import torch.multiprocessing as multiprocessing

pytest.importorskip("transformers")

from rpo_kernels import RPO
from rpo_kernels.train import BatchForm
from rpo_kernels.train.loss_layer import LossLayer, preference_loss
from training import dataset, tiny_model, with_reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


def loss_of(model: torch.nn.Module, rank: int) -> torch.Tensor:
    """The loss of this process's groups, which are more for the second process."""
    examples = [*with_reference(dataset(5, (2, 4, 3)))]
    part = examples[:2] if rank == 0 else examples[2:]
    (batch,) = BatchForm(shared=True)(part)["micro_batches"]
    return preference_loss(model, batch, RPO(beta=0.5), LossLayer("head", memory_budget="64MB")).loss


def work(rank: int, port: int, results: multiprocessing.SimpleQueue) -> None:
    """Forward and backward of a sharded model; the gradients come back whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss = loss_of(model, rank)
    loss.backward()
    gradients = {}
    for name, weight in model.named_parameters():
        assert isinstance(weight.grad, DTensor)
        gradients[name] = weight.grad.full_tensor().numpy()
    results.put((rank, loss.item(), gradients))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_under_fsdp():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=work, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: (loss, gradients) for rank, loss, gradients in (results.get() for _ in workers)}
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    model = tiny_model()
    losses = [loss_of(model, rank) for rank in range(2)]
    torch.stack(losses).mean().backward()
    for rank, (loss, gradients) in found.items():
        assert loss == pytest.approx(losses[rank].item(), rel=1e-5)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(gradients[name]), weight.grad, rtol=1e-4, atol=1e-6, msg=name)
