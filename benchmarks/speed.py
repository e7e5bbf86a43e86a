"""How fast AIR trains and infers, against a naive version of it and against what the machine can do.

    python benchmarks/speed.py            # steps per second, beside the naive version and the floor
    python benchmarks/speed.py --all      # also inference, memory, and how the time of a step grows

The naive version is AIR as it is usually written: the LSTMs of guide and baseline, 256 units each,
are fed the raw image at every step; objects are placed with affine_grid and grid_sample; the
likelihood is one site at the end; the mini-batch is subsampled in a plate over all 60,000 images;
Pyro gives every parameter an optimizer of its own, and validates every distribution. No other
slowness was put in: it takes the same second look (`refine`), with `grid_sample`. Ours is what
main.py trains by default; its baseline has 64 units.

The floor is what a step cannot do without: its matrix products, forward and backward, recorded as
they happen and timed by themselves; and the bytes that Adam has to move (each parameter, its
gradient and its two moments are read, all but the gradient written: 28 bytes), at the speed of a copy.

The versions take turns in short rounds, so that all see the machine in the same mood. The last line
is a JSON object with the medians.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent))

from air import AIR, GLIMPSE_WIDTH, to_images
from training.svi import make_svi

ROOT = Path(__file__).parent.parent


class NaiveAIR(nn.Module):
    """AIR with the networks of `air.AIR`, written without a thought for speed."""

    def __init__(self, air: AIR, x_all: torch.Tensor, batch_size: int):
        super().__init__()
        self.air, self.x_all, self.batch_size = air, x_all, batch_size
        self.seen_size = air.refine.correct.in_features
        size = air.image_size**2 + 3 + air.z_what_size + self.seen_size
        self.rnn = nn.LSTMCell(size, air.rnn.state_size)
        self.baseline_rnn = nn.LSTMCell(size, air.baseline.rnn.state_size)
        self.predict, self.refine, self.encode, self.decode = air.predict, air.refine, air.encode, air.decode
        self.baseline_linear = air.baseline.linear

    def transform(self, z_where, images, size):
        theta = torch.zeros(len(z_where), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = z_where[:, 0]
        theta[:, :, 2] = z_where[:, 1:]
        grid = nn.functional.affine_grid(theta, (len(z_where), 1, size, size), align_corners=False)
        return nn.functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]

    def crop(self, z_where, x):
        s = z_where[:, :1].clamp(min=1)
        return self.transform(torch.cat([1 / s, -z_where[:, 1:] / s], -1), x, self.air.window_size)

    def model(self):
        pyro.module("naive", self)
        air = self.air
        with pyro.plate("scenes", len(self.x_all), subsample_size=self.batch_size) as index:
            x, n = to_images(self.x_all[index]), len(index)
            canvas, z_pres = torch.zeros_like(x), torch.ones(n)
            for t in range(air.num_steps):
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(air.p_more[t] * z_pres))
                with poutine.mask(mask=z_pres.bool()):
                    pose = dist.Normal(air.z_where_loc, air.z_where_scale).expand([n, 3])
                    z_where = pyro.sample(f"z_where_{t}", pose.to_event(1))
                    code = dist.Normal(torch.zeros(n, air.z_what_size), 1.0)
                    z_what = pyro.sample(f"z_what_{t}", code.to_event(1))
                y = self.transform(z_where, self.decode(z_what), air.image_size)
                canvas = canvas + z_pres[:, None, None] * y
            pyro.sample("x", dist.Normal(canvas, air.likelihood_sd).to_event(2), obs=x)

    def guide(self):
        pyro.module("naive", self)
        air = self.air
        with pyro.plate("scenes", len(self.x_all), subsample_size=self.batch_size) as index:
            x, n = to_images(self.x_all[index]), len(index)
            state, baseline_state = air.rnn.start(n), air.baseline.rnn.start(n)
            z_pres, z_where, z_what = torch.ones(n), torch.zeros(n, 3), torch.zeros(n, air.z_what_size)
            seen = torch.zeros(n, self.seen_size)
            for t in range(air.num_steps):
                inputs = torch.cat([x.flatten(1), z_where, z_what, seen], -1)
                state = self.rnn(inputs, state)
                baseline_state = self.baseline_rnn(inputs.detach(), baseline_state)
                value = 550 + 100 * self.baseline_linear(baseline_state[0])[:, 0]
                p_more, loc, scale = self.predict(state[0])
                loc, scale, seen = self.refine(self.crop(loc / GLIMPSE_WIDTH, x), loc, scale)
                infer = {"baseline": {"baseline_value": value * z_pres.detach()}}
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p_more * z_pres), infer=infer)
                with poutine.mask(mask=z_pres.bool()):
                    z_where = pyro.sample(f"z_where_{t}", dist.Normal(loc, scale).to_event(1))
                    x_att = self.crop(z_where, x)
                    z_what = pyro.sample(f"z_what_{t}", dist.Normal(*self.encode(x_att)).to_event(1))


def naive_step(x_all, batch_size):
    pyro.clear_param_store()
    naive = NaiveAIR(AIR(baseline_size=256), x_all, batch_size)
    rates = {"lr": 1e-3}
    return SVI(naive.model, naive.guide, pyro.optim.Adam(rates), TraceGraph_ELBO(max_plate_nesting=1)).step


def our_step(x_all, batch_size, estimator="tracegraph", **sizes):
    air = AIR(baseline="rnn" if estimator == "tracegraph" else "none", **sizes)
    svi, _ = make_svi(air, estimator)

    def step():
        svi.step(to_images(x_all[torch.randint(len(x_all), (batch_size,))]))

    step.parameters = sum(p.numel() for p in air.parameters())
    return step


# ------------------------------------------------------------------------------------- the floor


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products, convolutions among them, that are computed while it is active."""

    def __init__(self):
        super().__init__()
        self.products = []
        self.multiply_adds = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation._overloadpacket in flop_registry:
            self.multiply_adds += flop_registry[operation._overloadpacket](*args, out_val=result) // 2
            # Not the tensors themselves, which would be kept.
            args = [Like(arg.shape, arg.stride()) if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.products.append((operation, args))
        return result

    def replay(self):
        """A function that does nothing but these products, on numbers of its own."""
        calls = []
        for operation, args in self.products:
            calls.append((operation, [arg.normal() if isinstance(arg, Like) else arg for arg in args]))

        def run():
            for operation, args in calls:
                operation(*args)

        return run


class Like(NamedTuple):
    """What a tensor looks like."""

    shape: torch.Size
    stride: tuple[int, ...]

    def normal(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride).normal_()


def copying(parameters):
    """A function that moves as many bytes as Adam must for so many parameters: 28 for each."""
    source = torch.ones(7 * parameters // 2)  # Copying reads and writes 4 bytes a number.
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# ---------------------------------------------------------------------------------- measurements


def interleaved(functions, rounds, repeats, before=lambda name: None):
    """Seconds per call of each function, one number a round; the functions take turns."""
    seconds = {name: [] for name in functions}
    for round in range(rounds + 1):
        for name, function in functions.items():
            before(name)
            started = time.perf_counter()
            for _ in range(repeats):
                function()
            if round:  # The first one warms up.
                seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds


def training(x_all, args):
    """The table of the versions and their floors; returns the JSON line."""
    ours = {name: our_step(x_all, args.batch_size, name) for name in ("tracegraph", "traceenum")}
    functions = {"naive": naive_step(x_all, args.batch_size), **ours}
    pyro.enable_validation(False)
    work = {}
    for name, step in ours.items():
        step()
        with MatrixProducts() as recorded:
            step()
        work[name] = recorded
        functions[f"{name} products"] = recorded.replay()
        functions[f"{name} copy"] = copying(step.parameters)
    # Validation is Pyro's default; main.py turns it off.
    seconds = interleaved(functions, args.rounds, args.steps, lambda name: pyro.enable_validation(name == "naive"))
    floors = {name: [a + b for a, b in zip(seconds[f"{name} products"], seconds[f"{name} copy"])] for name in ours}

    def ratio(numerator, denominator):
        return median(n / d for n, d in zip(numerator, denominator))

    print(f"{'version':>12} {'ms/step':>9} {'steps/s':>9} {'x naive':>8} {'floor, ms':>10} {'x floor':>8}")
    print(f"{'naive':>12} {1000 * median(seconds['naive']):>9.1f} {1 / median(seconds['naive']):>9.1f}")
    result = {"naive_steps_per_s": 1 / median(seconds["naive"])}
    for name, suffix in (("tracegraph", ""), ("traceenum", "_traceenum")):
        step = median(seconds[name])
        result |= {
            f"steps_per_s{suffix}": 1 / step,
            f"ratio{suffix}": ratio(seconds["naive"], seconds[name]),
            f"floor_ratio{suffix}": ratio(seconds[name], floors[name]),
        }
        print(
            f"{name:>12} {1000 * step:>9.1f} {1 / step:>9.1f} {result[f'ratio{suffix}']:>8.2f}"
            f" {1000 * median(floors[name]):>10.1f} {result[f'floor_ratio{suffix}']:>8.2f}"
        )
    for name in ours:
        products, copy = (1000 * median(seconds[f"{name} {part}"]) for part in ("products", "copy"))
        print(
            f"floor of {name}: {len(work[name].products)} matrix products,"
            f" {work[name].multiply_adds / 1e6:,.0f} million multiply-adds, {products:.1f} ms;"
            f" {28 * ours[name].parameters / 1e6:,.0f} MB for Adam, {copy:.1f} ms"
        )
    return {name: round_to(value) for name, value in result.items()}


def inference(x_all, args):
    """Images per second: counting is a run of the guide, a reconstruction all of `AIR.infer`."""
    air = AIR().eval()
    print(f"{'inference':>12} {'batch':>9} {'images/s':>9}")
    for batch_size in (1, 256):
        x = to_images(x_all[:batch_size])

        def counting(x=x):
            with torch.no_grad():
                air.guide(x)

        functions = {"counting": counting, "all": lambda x=x: air.infer(x)}
        for name, times in interleaved(functions, args.rounds, args.steps).items():
            print(f"{name:>12} {batch_size:>9} {batch_size / median(times):>9,.0f}")


def growth(args):
    """Milliseconds per step against batch size, canvas and T, and the exponent of a power law through them."""
    settings = {
        "batch size": [32, 64, 128, 256, 512, 1024],
        "canvas": [50, 75, 100, 150, 200],
        "T": [1, 2, 3, 4, 6, 8],
    }
    for estimator in ("tracegraph", "traceenum"):
        for name, values in settings.items():
            steps = {}
            for value in values:
                size = value if name == "canvas" else 50
                x = (torch.rand(2048, size, size) * 2550 - 2295).clamp(min=0).byte()
                batch_size = value if name == "batch size" else 64
                steps[value] = our_step(
                    x, batch_size, estimator, num_steps=value if name == "T" else 3, image_size=size
                )
            times = {value: 1000 * median(s) for value, s in interleaved(steps, 3, 3).items()}
            slope = np.polyfit(np.log(values), np.log(list(times.values())), 1)[0]
            last = np.polyfit(np.log(values[-2:]), np.log(list(times.values())[-2:]), 1)[0]
            cells = "  ".join(f"{value}: {time:.0f}" for value, time in times.items())
            print(f"{estimator}, ms per step by {name}:  {cells}   exponent {slope:.2f} (at the end {last:.2f})")


def memory():
    """Peak memory of a run of main.py: 20 steps and an evaluation, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "main.py", "-n", "20", "--data-dir", ROOT / "data", "--out", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
    print(f"peak memory of a run: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description="How fast AIR trains and infers.")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10, help="times the versions take turns")
    parser.add_argument("--steps", type=int, default=15, help="steps a turn")
    parser.add_argument("--all", action="store_true", help="also inference, memory and growth; takes some minutes")
    args = parser.parse_args()
    if args.all:
        memory()  # First, while this process is small: a child counts from its parent's size.
    # The images' content makes no difference to the time; a tenth of the pixels is ink, as in MNIST.
    pyro.set_rng_seed(0)
    x_all = (torch.rand(60_000, 50, 50) * 2550 - 2295).clamp(min=0).byte()
    threads = torch.get_num_threads()
    print(
        f"batch {args.batch_size}, {threads} threads, medians over {args.rounds} rounds of {args.steps} steps in turn"
    )
    line = training(x_all, args)
    if args.all:
        inference(x_all, args)
        growth(args)
    print(json.dumps(line))


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
