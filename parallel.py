"""Training in several processes, as torchrun starts them, with PyTorch's own torch.distributed.

Each process (rank) has its share of the scenes, of every mini-batch and its own random numbers; the
gradients are added up, so that all take the same step, the one that a single process would take with
the whole mini-batch.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# How long the others wait for the first while it evaluates, draws and writes. (torchrun itself sees at
# once if a process has ended, and ends the others.)
PATIENCE = timedelta(hours=1)


class ProcessLost(Exception):
    """Another process of the job no longer answers."""


def guarded(method):
    """Tells the errors of torch.distributed from those of the computation, which are RuntimeErrors as well."""

    def call(self, *args):
        try:
            return method(self, *args)
        except RuntimeError as error:
            raise ProcessLost(f"another process of the job is lost: {str(error).splitlines()[0]}") from None

    return call


class Ranks:
    """The processes that train together, and which of them this one is; without torchrun it is alone.

    number: how many; rank: 0 .. number - 1; first: whether it is 0, which writes the files; device: where
    this process computes.
    """

    def __init__(self, cuda: bool):
        self.number, self.rank, self.local_rank = self.planned()
        self.first = self.rank == 0
        self.device = torch.device(f"cuda:{self.local_rank}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.number > 1:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
            self.wait()

    @staticmethod
    def planned() -> tuple[int, int, int]:
        """What torchrun says: how many processes, which one, and which of this machine's."""
        if not dist.is_torchelastic_launched():
            return 1, 0, 0
        return tuple(int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))

    @guarded
    def wait(self) -> None:
        """For all others to come here as well."""
        if self.number > 1:
            dist.barrier()

    @guarded
    def any(self, flag) -> bool:
        """Whether it is so in one of the processes."""
        if self.number == 1:
            return bool(flag)
        flag = torch.tensor(float(bool(flag)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    @guarded
    def add_up(self, loss: float, parameters: list[torch.Tensor]) -> float:
        """Replace the parameters' gradients by their sums over the processes; the sum of the losses."""
        if self.number == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([loss])])
        dist.all_reduce(total)
        *sums, loss = total.split([gradient.numel() for gradient in gradients] + [1])
        for gradient, its_sum in zip(gradients, sums):
            gradient.copy_(its_sum.view_as(gradient))
        return float(loss)

    @guarded
    def share(self, tensors) -> None:
        """Give all processes the first one's values."""
        if self.number > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @guarded
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other: `[n, ..]` to `[number * n, ..]`, on the CPU."""
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.number)]
        if self.number > 1:
            dist.all_gather(parts, tensor.to(self.device))
            tensor = torch.cat(parts)
        return tensor.cpu()

    def close(self) -> None:
        if self.number > 1:
            dist.destroy_process_group()
