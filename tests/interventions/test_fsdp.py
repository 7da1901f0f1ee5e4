"""FSDP2 on two gloo ranks: the same loss and gradients as one process."""

import socket

import pytest
import torch
import torch.distributed as dist
from tests.tiny import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from narrowly.interventions import Add, ProjectOut, attach, layer, site

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def train_step(model, order, checkpointing):
    """Loss and the gradient of every parameter, whole."""
    generator = torch.Generator().manual_seed(0)
    edits = [
        ProjectOut(torch.randn(32, 3, generator=generator), layer(0)),
        Add(torch.randn(32, generator=generator), site("*.1.mlp"), tokens="completion"),
    ]
    labels = IDS.masked_fill(IDS % 4 == 1, -100)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if order == "shard, attach":
        shard(model)
    attached = attach(model, edits)
    if order == "attach, shard":
        shard(model)
    loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    attached.verify()
    attached.close()
    whole = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]
    return loss.detach(), whole


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def rank(number, port, order, checkpointing, out):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2
    )
    model = tiny_model("llama", hidden_size=32).train()
    result = train_step(model, order, checkpointing)
    if number == 0:
        torch.save(result, out)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", ["attach, shard", "shard, attach"])
def test_two_ranks_equal_one_process(tmp_path, order, checkpointing):
    expected_loss, expected = train_step(
        tiny_model("llama", hidden_size=32).train(), "one process", False
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        rank, (port, order, checkpointing, str(tmp_path / "out.pt")), nprocs=2
    )
    loss, gradients = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
