"""How fast AIR trains and infers, with either guide, against what the machine can do.

    python benchmarks/speed.py            # steps per second of both guides, beside the floor
    python benchmarks/speed.py --cuda     # the same on a GPU
    python benchmarks/speed.py --all      # also inference, memory, and how the time of a step grows

The floor is what a step cannot do without: its matrix products, forward and backward, recorded as they happen and timed
by themselves; and the bytes that Adam has to move (each parameter, its gradient and its two moments are read, all but
the gradient written: 28 bytes), at the speed of a copy. The versions take turns in short rounds, so that all see the
machine in the same state.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
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

ROOT = Path(__file__).parent.parent
VERSIONS = [(guide, estimator) for guide in ("residual", "rnn") for estimator in ("tracegraph", "traceenum")]


def training_step(x_all, batch_size=128, guide="residual", estimator="tracegraph", **sizes):
    """A function that takes a training step, on the device that the images `x_all` are on."""
    air = AIR(guide=guide, baseline="rnn" if estimator == "tracegraph" else "none", **sizes).to(x_all.device)
    svi, _ = make_svi(air, estimator)

    def step():
        index = torch.randint(len(x_all), (batch_size,), device=x_all.device)
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
        step = functions[version] = training_step(x_all, 128, *version)
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
    """Images per second: counting is a run of the guide, "infer" all of `infer`."""
    air = AIR().to(x_all.device).eval()
    functions, guide = {}, torch.no_grad()(air.guide)
    for n in (1, 256):
        x = x_all[:n].float() / 255
        functions |= {("counting", n): partial(guide, x), ("infer", n): partial(infer, air, x)}
    print(f"{'inference':>12} {'batch':>9} {'images/s':>9}")
    for (name, n), times in interleaved(functions, rounds, repeats).items():
        print(f"{name:>12} {n:>9} {n / median(times):>9,.0f}")


def growth(device):
    """Milliseconds per step against batch size, canvas and T."""
    settings = [("batch_size", (32, 64, 128, 256, 512, 1024)), ("image_size", (50, 75, 100, 150, 200))]
    for name, values in [*settings, ("max_objects", (1, 2, 3, 4, 6, 8))]:
        sizes = values if name == "image_size" else [50] * len(values)
        steps = {v: training_step(images(2048, size, device), **{name: v}) for v, size in zip(values, sizes)}
        times = {value: 1000 * median(s) for value, s in interleaved(steps, 3, 3).items()}
        print(f"ms per step by {name}:", *(f"  {value}: {time:.0f}" for value, time in times.items()))


def memory():
    """Peak memory of a run of main.py: 20 steps and an evaluation, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "main.py", "-n", "20", "--data-dir", ROOT / "data", "--out", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
    print(f"peak memory of a run: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def images(n, size, device):
    """Images with ink on a tenth of the pixels, as in multi-MNIST; their content makes no difference to the time."""
    return (torch.rand(n, size, size, device=device) * 2550 - 2295).clamp(min=0).byte()


def main(argv=None):
    parser = argparse.ArgumentParser(description="How fast AIR trains and infers.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="times the versions take turns (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--all", action="store_true", help="also inference, memory and growth; takes some minutes")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if args.cuda else "cpu")
    if args.all:
        memory()  # First, while this process is small: a child counts from its parent's size.
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    x_all = images(60_000, 50, device)
    where = torch.cuda.get_device_name() if args.cuda else f"{torch.get_num_threads()} threads"
    print(f"batch 128, {where}, medians over {args.rounds} rounds of 10 steps in turn")
    training(x_all, args.rounds, 10)
    if args.all:
        inference(x_all, args.rounds, 10)
        growth(device)


if __name__ == "__main__":
    main()
