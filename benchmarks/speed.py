"""How fast AIR trains and infers, with either guide, against what the machine can do.

    python benchmarks/speed.py            # steps per second of both guides, beside the floor; images per second
    python benchmarks/speed.py --cuda     # the same on a GPU

The floor is what a step cannot do without: its matrix products, forward and backward, recorded as they happen and timed
by themselves; and the bytes that Adam has to move (each parameter, its gradient and its two moments are read, all but
the gradient written: 28 bytes), at the speed of a copy. The versions take turns in short rounds, so that all see the
machine in the same state.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

import pyro
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent))

from air import AIR
from inference import infer
from training.svi import make_svi

VERSIONS = [(guide, estimator) for guide in ("residual", "rnn") for estimator in ("tracegraph", "traceenum")]


def training_step(x_all, guide, estimator):
    """A function that takes a training step, on the device that the images `x_all` are on."""
    air = AIR(guide=guide, baseline="rnn" if estimator == "tracegraph" else "none").to(x_all.device)
    svi, _ = make_svi(air, estimator)

    def step():
        index = torch.randint(len(x_all), (128,), device=x_all.device)
        svi.step(x_all[index].float() / 255)

    step.parameters = sum(p.numel() for p in air.parameters())
    return step


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products, convolutions among them, that are computed while it is active."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._overloadpacket in flop_registry:
            # Only what the tensors look like: they themselves would be kept.
            self.products.append((operation, [on(arg, "meta") for arg in args]))
        return operation(*args, **(kwargs or {}))

    def replay(self, device):
        """A function that does nothing but these products, on numbers of its own."""
        calls = [(operation, [on(arg, device) for arg in args]) for operation, args in self.products]

        def run():
            for operation, args in calls:
                operation(*args)

        return run


def on(arg, device):
    """In place of a tensor one of random numbers that lies in memory in the same way."""
    if not isinstance(arg, torch.Tensor):
        return arg
    size = 1 + sum((n - 1) * step for n, step in zip(arg.shape, arg.stride()))
    return torch.randn(size, device=device).as_strided(arg.shape, arg.stride())


def interleaved(functions, rounds, repeats):
    """Seconds per call of each function, one number a round; the functions take turns."""
    threads = torch.get_num_threads()
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in functions.values()]
    seconds = [[timer.timeit(repeats).mean for timer in timers] for _ in range(rounds)]
    return dict(zip(functions, zip(*seconds)))


def training(x_all, rounds, repeats):
    """A table of the versions and their floors."""
    functions = {}
    for version in VERSIONS:
        step = functions[version] = training_step(x_all, *version)
        step()
        with MatrixProducts() as products:
            step()
        functions[version, "products"] = products.replay(x_all.device)
        # Adam moves 28 bytes for each parameter; copying reads and writes 4 bytes a number.
        source, target = torch.ones(2, 7 * step.parameters // 2, device=x_all.device)
        functions[version, "copy"] = partial(target.copy_, source)
    seconds = interleaved(functions, rounds, repeats)
    print(f"{'version':>21} {'ms/step':>8} {'steps/s':>8} {'floor, ms':>10} {'x floor':>8}")
    for version in VERSIONS:
        step, products, copy = seconds[version], seconds[version, "products"], seconds[version, "copy"]
        ratio = median(s / (p + c) for s, p, c in zip(step, products, copy))
        ms, floor = 1000 * median(step), 1000 * (median(products) + median(copy))
        print(f"{' '.join(version):>21} {ms:>8.1f} {1000 / ms:>8.1f} {floor:>10.1f} {ratio:>8.2f}")


def inference(x_all, rounds, repeats):
    """Images per second by one sample of the guide."""
    air = AIR().to(x_all.device).eval()
    functions = {n: partial(infer, air, x_all[:n].float() / 255) for n in (1, 256)}
    for n, times in interleaved(functions, rounds, repeats).items():
        print(f"one sample, {n} together: {n / median(times):,.0f} images/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description="How fast AIR trains and infers.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="times the versions take turns (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if args.cuda else "cpu")
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    # A tenth of the pixels is ink; what they show makes no difference to the time.
    x_all = (torch.rand(60_000, 50, 50, device=device) * 2550 - 2295).clamp(min=0).byte()
    where = torch.cuda.get_device_name() if args.cuda else f"{torch.get_num_threads()} threads"
    print(f"batch 128, {where}, medians over {args.rounds} rounds of 10 steps in turn")
    training(x_all, args.rounds, 10)
    inference(x_all, args.rounds, 10)


if __name__ == "__main__":
    main()
