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
        self.call(dist.init_process_group, "nccl" if cuda else "gloo", None, PATIENCE)
        self.wait()

    @staticmethod
    def planned() -> tuple[int, int, int]:
        """What torchrun says: how many processes, which one, and which of this machine's."""
        if not dist.is_torchelastic_launched():
            return 1, 0, 0
        return tuple(int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))

    def call(self, collective, *args) -> None:
        """One of torch.distributed's functions, which all processes have to call; alone, nothing.

        Tells its errors from those of the computation, which are RuntimeErrors as well.
        """
        if self.number == 1:
            return
        try:
            collective(*args)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". This is typically")[0]
            raise ProcessLost(f"another process of the job is lost ({reason})") from None

    def wait(self) -> None:
        """For all others to come here as well."""
        self.call(dist.barrier)

    def any(self, flag) -> bool:
        """Whether it is so in one of the processes."""
        if self.number == 1:
            return bool(flag)
        flag = torch.tensor(float(bool(flag)), device=self.device)
        self.call(dist.all_reduce, flag, dist.ReduceOp.MAX)
        return bool(flag)

    def add_up(self, loss: float, parameters: list[torch.Tensor]) -> float:
        """Replace the parameters' gradients by their sums over the processes; the sum of the losses."""
        if self.number == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([loss])])
        self.call(dist.all_reduce, total)
        *sums, loss = total.split([gradient.numel() for gradient in gradients] + [1])
        for gradient, its_sum in zip(gradients, sums):
            gradient.copy_(its_sum.view_as(gradient))
        return float(loss)

    def share(self, tensors) -> None:
        """Give all processes the first one's values."""
        for tensor in tensors:
            self.call(dist.broadcast, tensor, 0)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers in the tensors of all processes, one process after the other, on the CPU."""
        mine = tensor.flatten().to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.number - 1)] + [mine]
        self.call(dist.all_gather, parts, mine)
        return torch.cat(parts).cpu()

    def close(self) -> None:
        self.call(dist.destroy_process_group)
