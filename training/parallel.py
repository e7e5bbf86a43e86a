"""Training in several processes, as torchrun starts them, with PyTorch's own torch.distributed.

Each process (rank) has its share of the scenes, of every mini-batch and its own random numbers; the gradients are
added up, so that all take the same step, the one that a single process would take with the whole mini-batch.
"""

import math
import os
import signal

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from multi_mnist import one_line


class ProcessLost(Exception):
    """Another process of the job no longer answers."""


def launched() -> tuple[int, int, int]:
    """World size, rank and local rank of this process, as torchrun tells them; without torchrun it is alone."""
    if not dist.is_torchelastic_launched():
        return 1, 0, 0
    return tuple(int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))


class Processes:
    """The processes that train together, this one among them.

    stop_signal: the signal that this process was sent, to stop; should_stop: whether one of the processes
    was, before the last step; all of them know it after the same step.
    """

    def __init__(self, cuda: bool = False):
        self.world_size, self.rank, self.local_rank = launched()
        self.is_main = self.rank == 0  # evaluates, draws and writes the files
        self.device = torch.device(f"cuda:{self.local_rank}" if cuda else "cpu")
        self.stop_signal, self.should_stop = None, False
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.deterministic = True  # A run is resumed to the bit.
        self._call(dist.init_process_group, "nccl" if cuda else "gloo")
        self.barrier()

    def _call(self, collective, *args) -> None:
        """One of torch.distributed's functions, which all processes have to call. Alone, nothing is done.

        Tells its errors from those of the computation, which are RuntimeErrors as well.
        """
        if self.world_size == 1:
            return
        try:
            collective(*args)
        except RuntimeError as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to send it; first, the reason.
            raise ProcessLost(f"another process of the job is lost: {one_line(error)}") from None

    def barrier(self) -> None:
        """Wait for all others to come here as well."""
        self._call(dist.barrier)

    def all_reduce_gradients(self, loss: float, parameters: list[torch.nn.Parameter]) -> float:
        """Replace the parameters' gradients by their sums over the processes.

        Returns the sum of the losses; NaN in all processes if it, or a gradient, is not finite in one.
        """
        if self.world_size == 1:
            self.should_stop = self.stop_signal is not None
        else:  # Everything in one collective: gradients, loss, and whether to stop.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            others = gradients[0].new_tensor([loss, self.stop_signal is not None])
            total = torch.cat([*(gradient.flatten() for gradient in gradients), others])
            self._call(dist.all_reduce, total)
            *sums, others = total.split([gradient.numel() for gradient in gradients] + [2])
            for parameter, its_sum in zip(parameters, sums):
                parameter.grad = its_sum.view_as(parameter)
            loss, self.should_stop = others[0].item(), bool(others[1] > 0)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        return loss if norm.isfinite() else math.nan

    def any_stop_signal(self) -> bool:
        """Whether one of the processes was sent a signal to stop, also after the last step; all know the same."""
        return bool(self.all_gather(torch.tensor([self.stop_signal is not None], dtype=torch.int)).any())

    def broadcast(self, tensors) -> None:
        """Give all processes the main one's values."""
        for tensor in tensors:
            self._call(dist.broadcast, tensor, 0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors `[k]` of all processes, one process after the other, `[world_size * k]`, on the CPU."""
        mine = tensor.to(self.device)
        parts = [mine] + [torch.empty_like(mine) for _ in range(self.world_size - 1)]
        self._call(dist.all_gather, parts, mine.clone())
        return torch.cat(parts).cpu()

    def close(self) -> None:
        self._call(dist.destroy_process_group)
