"""Train Attend, Infer, Repeat on multi-MNIST, so that it learns to count without being told how.

python main.py                                   # train, evaluate, draw
torchrun --nproc-per-node 4 main.py              # the same in four processes, on one machine or several
python main.py --data my.npz                     # the same with images of your own
python main.py --load runs/NAME                  # go on with a run that was interrupted
python main.py --load runs/NAME --eval-only      # evaluate it on the test scenes
python main.py --load runs/NAME --redraw         # draw its pictures again
python main.py --load runs/NAME --report         # how well it counts, finds, represents: report.html
python main.py --load runs/NAME --predict FOLDER # count what is in images of your own
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import datetime
from pathlib import Path

import numpy as np
import pyro
import torch
import torchvision
from filelock import FileLock, Timeout
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import viz
from air import AIR, CheckpointError, StaticTraceGraph_ELBO, read_checkpoint
from evaluation import evaluate, interval, own_random_numbers, to_images
from multi_mnist import DataError, Scenes, load_canvases, load_digits, load_split
from parallel import ProcessLost, Ranks
from predict import predict
from report import page, report

TITLES = {
    "attention": "{split} scenes: where the guide looked, step by step, and how many objects it counted",
    "reconstruction": "{split} scenes, and what the model makes of them",
    "steps": "{split} scenes, step by step: what was seen (crop), what was painted (object), the canvas after it",
    "mistakes": "{split} scenes (of the first {looked_at:,}) counted wrong: true count → inferred count",
    "prior": "Scenes that the model imagines: before it learned anything, and now",
    "curves": "Validation scenes, as it learns",
    "confusion": "{split} scenes: counts",
}
CURVES = {
    "ELBO, nats per image": "elbo",
    "count accuracy": "count_accuracy",
    "steps per second, mean so far": "steps_per_s",
    "variance of the cost of a choice\nthat the baseline explains": "baseline_explains",
}
# A longer gradient (its norm, summed over the mini-batch) is a fault: in ordinary training it stays below 1e7.
LONGEST_GRADIENT = 1e10
# So many faulty steps within so many end a run.
MOST_FAULTS, FAULTS_WITHIN = 3, 100
# What Pyro calls the averages of `--baseline average`, which it keeps itself, one for each place in the mini-batch.
AVERAGES = "__baseline"
# The prior on the count with --plain, at all times.
PLAIN_COUNT_RATIO = 0.01
# What a run is: a resumed run keeps these, and may be given others for the rest.
FIXED = (
    "batch_size",
    "learning_rate",
    "baseline_learning_rate",
    "seed",
    "model_steps",
    "likelihood_sd",
    "estimator",
    "baseline",
    "plain",
)
# What a resumed run keeps if it is not told otherwise.
KEPT = ("num_steps", "eval_every", "viz_every", "save_every", "data", "test_data")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "Encountered NaN")  # of Pyro's; `put_up_with` tells more
    try:
        checkpoint, given_data = None, args.data
        if args.data and args.predict:
            raise UsageError("--data has no use with --predict, which reads the images it names")
        if args.data and args.test_data and args.eval_only:
            raise UsageError("--test-data has no use with --eval-only --data, which holds nothing out")
        if args.load:
            path = args.load / "checkpoint.pt" if args.load.is_dir() else args.load
            checkpoint = read_checkpoint(path)
            args = adopt_flags(parser, argv, checkpoint)
            args.load = path
        check_flags(args)
        if args.eval_only:
            print(json.dumps(evaluate_only(args, checkpoint, given_data)))
        elif args.redraw:
            redraw(args, checkpoint)
        elif args.report:
            write_report(args, checkpoint)
        elif args.predict:
            predict_only(args, checkpoint)
        else:
            with redirect_stderr(Unbreakable(sys.stderr)):
                train(args, checkpoint)
    except (CheckpointError, DataError, UsageError) as error:
        parser.error(shorten(str(error)))
    except OSError as error:
        sys.exit(f"main.py: error: {error}")
    except (KeyboardInterrupt, ProcessLost) as reason:
        saved = args.out and (args.out / "checkpoint.pt").exists()
        what = f"main.py: error: {reason}" if isinstance(reason, ProcessLost) else "interrupted"
        print(what + (f"; --load {args.out} goes on from the last checkpoint" if saved else ""), file=sys.stderr)
        sys.exit(1 if isinstance(reason, ProcessLost) else 130)


# --------------------------------------------------------------------------------- the main thing


def train(args, checkpoint: dict | None) -> None:
    """Data, AIR, SVI, evaluation, checkpoint, pictures."""
    ranks = Ranks(args.cuda)
    # On each machine one process first: it may have to fetch and compose the scenes.
    for turn in (True, False):
        if turn == (ranks.local_rank == 0):
            train_scenes, validation_scenes, test_scenes = load_scenes(args, checkpoint)
        ranks.wait()
    dashboard = connect(args) if ranks.first else None
    if len(train_scenes.x) < ranks.number:
        raise UsageError(f"{len(train_scenes.x)} images are too few for torchrun's {ranks.number} processes")
    # This process's share; uint8: a mini-batch becomes floats when it is drawn.
    train_x = torch.from_numpy(train_scenes.x)[ranks.rank :: ranks.number]

    pyro.clear_param_store()  # of an earlier run in the same process
    pyro.set_rng_seed(args.seed)
    if checkpoint:
        air = AIR.from_checkpoint(checkpoint, args.load)
    else:
        options = {"likelihood_sd": args.likelihood_sd, "baseline": args.baseline}
        if args.plain:
            options |= {"refine": False, "exploration": 0.0}
        air = AIR(args.model_steps, image_size=train_scenes.x.shape[1], **options)
    air.to(ranks.device)
    ranks.share(air.state_dict().values())

    svi, adam = make_svi(air, args.estimator, ranks)
    pyro.enable_validation(False)  # Its checks of every distribution take time; tests leave them on.
    rates = (args.learning_rate, args.baseline_learning_rate)

    run = Run(args, air, adam, checkpoint, ranks)
    screen = viz.Screen(run.folder, dashboard)

    def measure(split, scenes):
        return run.record(split, evaluate(air, scenes)) if ranks.first else None

    def show(split, scenes):
        if ranks.first:
            started = time.perf_counter()
            screen.show(draw(air, split, scenes, run.folder, args.seed))
            run.seconds_for_pictures += time.perf_counter() - started

    bar = tqdm(
        total=args.num_steps, initial=run.step, unit="step", mininterval=0.5, smoothing=0.05, disable=not ranks.first
    )
    with run.lock, bar, stop_signals() as stopped:
        if run.step == 0:
            show("validation", validation_scenes)
        while run.step < args.num_steps and not ranks.any(stopped):
            started = time.perf_counter()
            for group, rate in zip(adam.param_groups, rates):
                group["lr"] = rate * schedule(run.step, args.num_steps)
            air.set_count_prior(PLAIN_COUNT_RATIO if args.plain else count_ratio(run.step, args.num_steps))
            batch = torch.randint(len(train_x), (args.batch_size // ranks.number,))
            x = to_images(train_x[batch], ranks.device)
            try:
                loss = svi.step(x)
            except (NumericalFault, RuntimeError) as fault:
                run.put_up_with(fault, None if isinstance(fault, FaultElsewhere) else blame(air, x, fault))
                adam.zero_grad()
                continue  # Nothing was changed but the random numbers.
            run.step += 1
            run.seconds += time.perf_counter() - started

            bar.update()
            bar.set_postfix_str(
                f"ELBO {-loss / args.batch_size:.1f}, validation accuracy {run.accuracy}", refresh=False
            )
            if run.step % math.gcd(args.eval_every, args.viz_every, args.save_every) == 0 or run.step == args.num_steps:
                run.check_parameters()
            if run.step % args.eval_every == 0 or run.step == args.num_steps:
                measure("validation", validation_scenes)
            if run.step % args.viz_every == 0:
                show("validation", validation_scenes)
            if run.step % args.save_every == 0 or run.step == args.num_steps:
                run.save()
        if ranks.any(stopped):
            run.save()
            show("validation", validation_scenes)
            bar.close()
            number = stopped[0] if stopped else signal.SIGTERM  # The other processes were told by the one that was.
            if ranks.first:
                went_on = f"`--load {run.folder}` goes on from here"
                print(f"{number.name} after step {run.step}: {went_on}", file=sys.stderr)
            sys.exit(128 + number)

    ranks.close()
    result = measure("test", test_scenes)
    show("test", test_scenes)
    if result:
        print(summary(result, run.folder, run.seconds_for_pictures))


def load_scenes(args, checkpoint: dict | None) -> tuple[Scenes, Scenes, Scenes]:
    """Training, validation and test scenes: multi-MNIST, or the user's own.

    Of those the last tenth, or the file that is named for it, is held out, and is both of the latter.
    """
    size = AIR.from_checkpoint(checkpoint, args.load).image_size if checkpoint else None
    if not args.data:
        splits = tuple(load_split(split, args.data_dir, args.mnist_root) for split in ("train", "validation", "test"))
        if size not in (None, splits[0].x.shape[1]):
            raise UsageError(f"this AIR looks at images of {size} pixels, no multi-MNIST scenes are: give --data")
        return splits
    scenes = load_canvases(args.data, size)
    if args.test_data:
        held_out = load_canvases(args.test_data, scenes.x.shape[1])
    else:
        n = len(scenes.x) // 10
        if n == 0:
            raise UsageError(f"--data {args.data}: {len(scenes.x)} images are too few to hold a tenth out")
        parts = slice(None, -n), slice(-n, None)
        scenes, held_out = (Scenes(*(array if array is None else array[part] for array in scenes)) for part in parts)
    for part in (scenes, held_out):
        if part.counts is not None and part.counts.max() > args.model_steps:
            most = part.counts.max()
            raise UsageError(f"--model-steps {args.model_steps}: there are images with {most} objects; give -t {most}")
    return scenes, held_out, held_out


def make_svi(air: AIR, estimator: str, ranks: Ranks | None = None) -> tuple[SVI, torch.optim.Adam]:
    """The inference algorithm, and the optimizer behind it: one Adam, a parameter group for the baseline's rate.

    estimator: "tracegraph" samples `z_pres` and reduces the variance of its gradient; "traceenum" sums
        over its values, all T + 1 counts, and has no such variance. The rest is sampled by both.

    A step raises NumericalFault (or PyTorch's RuntimeError), and changes nothing, if in one of the
    processes the loss or the gradient is not finite or cannot be had, or the gradient is absurdly long.
    """
    ranks = ranks or Ranks(cuda=False)
    baseline = [p for name, p in air.named_parameters() if name.startswith("baseline.")]
    others = [p for name, p in air.named_parameters() if not name.startswith("baseline.")]
    adam = torch.optim.Adam([{"params": others}, {"params": baseline}], fused=True)
    if estimator == "tracegraph":
        guide, elbo = air.guide, StaticTraceGraph_ELBO(max_plate_nesting=1)
    else:
        # z_pres is the guide's only discrete choice.
        guide, elbo = config_enumerate(air.guide), TraceEnum_ELBO(max_plate_nesting=1)

    def loss_and_grads(*args):
        fault, store = None, pyro.get_param_store()
        averages = {name: value.detach().clone() for name, value in store.items() if name.startswith(AVERAGES)}
        try:
            loss = elbo.loss_and_grads(*args)
            length = get_total_norm([p.grad for p in air.parameters() if p.grad is not None]).item()
            if not math.isfinite(loss):
                fault = NumericalFault(f"the loss is {loss}")
            elif not length < LONGEST_GRADIENT:
                fault = NumericalFault(f"the gradient's norm is {length:.1e}")
        except RuntimeError as error:  # PyTorch's way to refuse numbers that are not finite, among others
            fault = error
        if ranks.any(fault):
            for name in [name for name in store.keys() if name.startswith(AVERAGES)]:
                del store[name]
            for name, value in averages.items():
                pyro.param(name, value)
            raise fault or FaultElsewhere
        return ranks.add_up(loss, list(air.parameters()))

    return SVI(air.model, guide, OneOptimizer(adam), elbo.loss, loss_and_grads), adam


def schedule(step: int, num_steps: int, warm_up: int = 100) -> float:
    """The learning rate at `step`, as a part of its largest: a short linear rise, then half a cosine down to 0."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def count_ratio(step: int, num_steps: int, first: float = 1e-4) -> float:
    """The ratio of the prior on the count at `step`: from a strict prior to a uniform one, in half of the run."""
    return first ** max(0.0, 1 - 2 * step / num_steps)


class OneOptimizer(PyroOptim):
    """Lets SVI step one torch optimizer for all parameters, where Pyro would make one for each of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __call__(self, params) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def evaluate_only(args, checkpoint: dict, data: Path | None) -> dict:
    """What would be a line of metrics.jsonl: on the run's test scenes, or on all images in the file `data`."""
    air = AIR.from_checkpoint(checkpoint, args.load).to("cuda" if args.cuda else "cpu")
    scenes = load_canvases(data, air.image_size) if data else load_scenes(args, checkpoint)[2]
    return metrics_line("data" if data else "test", checkpoint["step"], checkpoint["seconds"], evaluate(air, scenes))


def predict_only(args, checkpoint: dict) -> None:
    """What is in the user's images, as JSON; exit status 1 if one of the files could not be read."""
    air = AIR.from_checkpoint(checkpoint, args.load).to("cuda" if args.cuda else "cpu")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    results = predict(air, args.predict, args.invert, args.out)
    text = "[" + ",\n ".join(map(json.dumps, results)) + "]"  # a line for each
    if args.json:
        write(args.json, text + "\n")
    else:
        print(text)
    bad = [result for result in results if "error" in result]
    for result in bad:
        print(f"{result['file']}: {shorten(result['error'])}", file=sys.stderr)
    if bad:
        sys.exit(1)


def write_report(args, checkpoint: dict) -> None:
    """report.json and report.html, in the run's folder."""
    folder = args.load.parent
    air = AIR.from_checkpoint(checkpoint, args.load).to("cuda" if args.cuda else "cpu")
    test_scenes = load_scenes(args, checkpoint)[2]
    digits = load_digits(False, args.data_dir, args.mnist_root)
    measured, pictures = report(air, test_scenes, *digits)
    title = f"An AIR after {checkpoint['step']:,} steps (seed {args.seed}, {args.estimator})"
    write(folder / "report.json", json.dumps({"step": checkpoint["step"]} | measured, indent=1) + "\n")
    write(folder / "report.html", page(title, measured, pictures))
    print(f"{folder / 'report.html'} and {folder / 'report.json'}")


# ------------------------------------------------------------------------- when things go wrong


class NumericalFault(ArithmeticError):
    """A loss or gradient that must not be used for a step."""


class FaultElsewhere(NumericalFault):
    """Another process's, which tells of it."""


class FirstFault(Messenger):
    """Raises NumericalFault, and keeps the site's name, at the first site with parameters or a density not finite."""

    def _pyro_sample(self, msg):
        # Looked at before it is drawn from: PyTorch itself refuses to, with an error like many others.
        if isinstance(msg["fn"], torch.distributions.Distribution) and not msg["is_observed"]:
            self.check(msg, msg["fn"].mean, msg["fn"].variance)

    def _pyro_post_sample(self, msg):
        self.check(msg, msg["fn"].log_prob(msg["value"]))

    def check(self, msg, *numbers):
        if not all(number.isfinite().all() for number in numbers):
            self.site = msg["name"]
            raise NumericalFault


@torch.no_grad()
def blame(air: AIR, x: torch.Tensor, fault: Exception) -> str:
    """Where the numbers go wrong on the mini-batch `x`: a sample site or, if all are well, a parameter's gradient.

    Raises `fault` again if nothing is wrong with the numbers.
    """
    with FirstFault() as search:
        try:
            guide = poutine.trace(air.guide).get_trace(x)
            poutine.replay(air.model, guide)(x)
        except NumericalFault:
            return f"site {search.site}"
        except RuntimeError:
            raise fault from None
    if not isinstance(fault, NumericalFault):
        raise fault
    lengths = {name: p.grad.norm().nan_to_num(math.inf) for name, p in air.named_parameters() if p.grad is not None}
    return f"the gradient of {max(lengths, key=lengths.get)}"


@contextmanager
def stop_signals():
    """Within it, SIGINT and SIGTERM only add themselves to the list that it gives, each once; a second one acts."""
    noted = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number, frame):
        noted.append(signal.Signals(number))
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, note)
    restore = True
    try:
        yield noted
    except ProcessLost:
        restore = False  # torchrun is about to send SIGTERM; there is something to be told first
        raise
    finally:
        for number, handler in handlers.items() if restore else ():
            signal.signal(number, handler)


class Unbreakable:
    """A stream that may have lost its reader, as in `2>&1 | tee log` after a Ctrl-C; what cannot be told is not."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def shorten(text: str) -> str:
    """An error of files with much in them, as one line that can be read."""
    text = " ".join(text.split())
    return text if len(text) < 500 else f"{text[:400]} .. {text[-90:]}"


# ---------------------------------------------------------------------------- what a run leaves


class Run:
    """A run's progress, and its folder: config.json, metrics.jsonl, checkpoint.pt."""

    def __init__(self, args, air: AIR, optimizer: torch.optim.Optimizer, checkpoint: dict | None, ranks: Ranks):
        self.args, self.air, self.optimizer, self.ranks = args, air, optimizer, ranks
        self.step, self.seconds, self.seconds_for_pictures, self.accuracy = 0, 0.0, 0.0, "-"
        self.folder, self.faults = args.out, []
        if checkpoint:
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
            self.restore(checkpoint)
        elif not ranks.first:
            self.own_stream()
        if len(ranks.gather(torch.tensor([self.step])).unique()) > 1:
            raise UsageError("the machines' checkpoints are of different steps: copy the run's folder to all of them")
        if not ranks.first:
            self.lock = nullcontext()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise UsageError(f"another process is training in {self.folder}") from None
        kept = []
        if checkpoint:
            earlier = read_metrics(args.load.parent) if in_run_folder(args.load) else []
            kept = [line for line in earlier if line["step"] <= self.step and line["split"] != "test"]
        elif args.overwrite:
            texts = ("config.json", "metrics.jsonl", "report.json", "report.html")
            for name in ("checkpoint.pt", *texts, *(f"{name}.png" for name in TITLES)):
                (self.folder / name).unlink(missing_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
        versions |= {"torchvision": torchvision.__version__, "numpy": np.__version__}
        config = {
            "flags": plain_values(args, vars(args)),
            "seed": args.seed,
            "air": air.config,
            "versions": versions,
            "processes": ranks.number,
            "threads": torch.get_num_threads(),
        }
        write(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def record(self, split: str, measured: dict) -> dict:
        """Append a line to metrics.jsonl."""
        line = metrics_line(split, self.step, self.seconds, measured)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.accuracy = "-" if line["count_accuracy"] is None else f"{line['count_accuracy']:.2%}"
        return line

    def save(self) -> None:
        """Write the checkpoint; all processes have to come here, for their part of it."""
        rng = self.ranks.gather(torch.get_rng_state())
        cuda_rng = self.ranks.gather(torch.cuda.get_rng_state()) if self.args.cuda else None
        averages = {
            name: self.ranks.gather(value.detach())
            for name, value in sorted(pyro.get_param_store().items())
            if name.startswith(AVERAGES)
        }
        if not self.ranks.first:
            return
        self.air.save(
            self.folder / "checkpoint.pt",
            step=self.step,
            seconds=self.seconds,
            flags=plain_values(self.args, (*KEPT, *FIXED)),
            optimizer=self.optimizer.state_dict(),
            rng=rng,
            cuda_rng=cuda_rng,
            averages=averages,
        )

    def restore(self, checkpoint: dict) -> None:
        """The optimizer's moments and the random numbers' state as they were. Raises CheckpointError.

        With another number of processes than before, the random numbers are others.
        """
        processes, rank = self.ranks.number, self.ranks.rank
        try:
            state, groups = checkpoint["optimizer"]["state"], self.optimizer.state_dict()["param_groups"]
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for number, moments in state.items():
                shapes = {name: parameters[number].shape for name in ("exp_avg", "exp_avg_sq")} | {"step": ()}
                if {name: tuple(value.shape) for name, value in moments.items()} != shapes:
                    raise ValueError("the optimizer's state does not fit the parameters")
                if not all(value.isfinite().all() for value in moments.values()):
                    raise ValueError("the optimizer's state is not finite")
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            for name, average in checkpoint["averages"].items():
                share = average.view(processes, -1)[rank].clone()
                # (Of a single image, Pyro wants a number, not a vector of one.)
                pyro.param(name, (share if len(share) > 1 else share[0]).to(self.air.p_more.device))
            states = checkpoint["rng"].view(-1, len(torch.get_rng_state()))
            if len(states) != processes:
                self.own_stream()
            else:
                torch.set_rng_state(states[rank].clone())  # PyTorch does not take a part of a tensor for one.
                if self.args.cuda and checkpoint["cuda_rng"] is not None:
                    torch.cuda.set_rng_state(checkpoint["cuda_rng"].view(processes, -1)[rank].clone())
        except Exception as error:  # Whatever goes wrong, the file is at fault.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.args.load} cannot be gone on with: {reason}") from None

    def own_stream(self) -> None:
        """Random numbers of this process, from this step on."""
        of_this = np.random.SeedSequence([self.args.seed, self.ranks.rank, self.step])
        torch.manual_seed(int(of_this.generate_state(1)[0]))

    def put_up_with(self, fault: Exception, where: str | None) -> None:
        """Tell of a step that was not taken, if it was this process's; end the run if it was one too many."""
        self.faults = [step for step in self.faults if step > self.step - FAULTS_WITHIN] + [self.step]
        if where:
            tqdm.write(f"step {self.step + 1} was not taken: {str(fault).splitlines()[0]}; from {where}", sys.stderr)
        if len(self.faults) == MOST_FAULTS:
            sys.exit(
                f"main.py: gave up, {MOST_FAULTS} steps of {FAULTS_WITHIN} went wrong; "
                f"a smaller --learning-rate may help; {self.last_checkpoint()}"
            )

    def check_parameters(self) -> None:
        """End the run if they are not finite: nothing can be learned from there, and nothing shall be saved."""
        if not all(parameter.isfinite().all() for parameter in self.air.parameters()):
            sys.exit(f"main.py: gave up, step {self.step} made parameters infinite; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        saved = self.folder / "checkpoint.pt"
        return f"{saved} is of an earlier step" if saved.exists() else "no checkpoint was due yet"


def plain_values(args, names: Iterable[str]) -> dict:
    """These flags as plain values."""
    flags = {name: getattr(args, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def write(path: Path, text: str) -> None:
    """Write a small file, at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def metrics_line(split: str, step: int, seconds: float, measured: dict) -> dict:
    speed = step / seconds if seconds else None
    return {
        "split": split,
        "step": step,
        "seconds": round(seconds, 3),
        "steps_per_s": speed and round(speed, 2),
    } | measured


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    try:
        parsed = [json.loads(line) for line in lines if line.endswith("\n")]  # A line cut short is not one.
        if not all(isinstance(line["split"], str) and isinstance(line["step"], int) for line in parsed):
            raise ValueError("a line without split and step")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return parsed


def draw(air: AIR, split: str, scenes: Scenes, folder: Path, seed: int, look_at: int = 1000) -> dict:
    """A run's pictures as it stands, with titles, by name: of held-out scenes, of imagined ones, of its metrics."""
    device = next(air.parameters()).device
    x = to_images(scenes.x[:look_at], device)
    with own_random_numbers(device, seed):
        newborn = AIR(**air.config).to(device)  # as it was before its first step
    imagined = torch.arange(1, 11, device=device) % (air.num_steps + 1)
    dreams = []
    for painter in (newborn, air):
        with own_random_numbers(device):
            dreams.extend(painter.imagine(imagined).cpu().numpy())
    with own_random_numbers(device):
        seen = {name: value.cpu().numpy() for name, value in air.infer(x)._asdict().items()}
    x, counts = x.cpu().numpy(), seen["counts"]
    boxes = [box[:count] for box, count in zip(seen["boxes"], counts)]

    titles = {name: title.format(split=split.capitalize(), looked_at=len(x)) for name, title in TITLES.items()}
    columns = min(10, len(x))
    n = min(30, len(x)) // columns * columns
    rows = [slice(start, start + columns) for start in range(0, n, columns)]
    sides = (x, seen["reconstruction"])
    pairs = [pair for row in rows for side in sides for pair in zip(side[row], boxes[row])]
    few = np.argsort(counts == 0, kind="stable")[:6]  # if possible, such with something in them
    steps = (seen[name][few] for name in ("boxes", "counts", "x_att", "y_att", "canvases", "count_probs"))
    pictures = {
        "attention": viz.draw_scenes(x[:n], boxes[:n], counts[:n], columns, titles["attention"]),
        "reconstruction": viz.draw_scenes(
            *zip(*pairs), None, columns, titles["reconstruction"], labels=["scene", "model"] * len(rows)
        ),
        "steps": viz.draw_steps(x[few], *steps, title=titles["steps"]),
        "prior": viz.draw_scenes(dreams, columns=10, title=titles["prior"], labels=["at first", "now"]),
    }
    if scenes.counts is not None:
        wrong = np.flatnonzero(scenes.counts[: len(x)] != counts)[:30]
        captions = [f"{scenes.counts[i]} → {counts[i]}" for i in wrong]
        pictures["mistakes"] = viz.draw_scenes(
            x[wrong], [boxes[i] for i in wrong], captions, columns, titles["mistakes"]
        )
    lines = read_metrics(folder)
    validated = [line for line in lines if line["split"] == "validation"]
    if validated:
        steps, seconds, *curves = (
            [line.get(name) for line in validated] for name in ("step", "seconds", *CURVES.values())
        )
        known = {title: (steps, seconds, curve) for title, curve in zip(CURVES, curves) if curve[-1] is not None}
        pictures["curves"] = viz.draw_curves(known, titles["curves"])
        confusion = [line["confusion"] for line in lines if line["split"] == split][-1:]
        if confusion and confusion[0]:
            pictures["confusion"] = viz.draw_confusion(confusion[0], titles["confusion"])
    return {name: (titles[name], picture) for name, picture in pictures.items()}


def redraw(args, checkpoint: dict) -> None:
    """The pictures of a run, once more, from what is in its folder."""
    folder = args.load.parent
    air = AIR.from_checkpoint(checkpoint, args.load).to("cuda" if args.cuda else "cpu")
    finished = any(line["split"] == "test" for line in read_metrics(folder))
    split = "test" if finished else "validation"
    scenes = load_scenes(args, checkpoint)[2 if finished else 1]
    viz.Screen(folder, connect(args)).show(draw(air, split, scenes, folder, args.seed))
    print(f"Pictures are in {folder}")


def connect(args) -> viz.Dashboard | None:
    """The visdom server, if one is there and wanted. Raises UsageError if it is wanted and not there."""
    if args.visdom == "off":
        return None
    try:
        return viz.Dashboard(args.visdom_server, args.visdom_port, args.visdom_env)
    except ConnectionError:
        none = f"no visdom server answers at {args.visdom_server}:{args.visdom_port}"
        hint = "`python -m visdom.server -bind_local` in another terminal starts one"
        if args.visdom == "on":
            raise UsageError(f"--visdom on: {none}; {hint}") from None
        print(f"{none}, pictures go to {args.out or args.load.parent} only ({hint})", file=sys.stderr)
        return None


def summary(result: dict, folder: Path, seconds_for_pictures: float) -> str:
    """What a user wants to know at the end of a run."""

    def with_interval(accuracy: float) -> str:
        low, high = interval(accuracy, result["images"])
        return f"{accuracy:.2%} (95% interval {low:.2%} to {high:.2%})"

    minutes = result["seconds"] / 60
    lines = [f"{result['images']:,} test scenes, {result['step']:,} steps, {minutes:.1f} minutes of training"]
    if result["count_accuracy"] is not None:
        lines += [
            f"  count accuracy   {with_interval(result['count_accuracy'])}, by one sample of the guide",
            f"                   {with_interval(result['count_accuracy_mode'])}, by its most probable count",
        ]
    lines += [
        f"  ELBO             {result['elbo']:.1f} nats per image",
        f"  last step used   in {result['last_step_rate']:.2%} of the images",
    ]
    if result["confusion"]:
        lines.append("  inferred count  " + "".join(f"{count:>8}" for count in range(len(result["confusion"][0]))))
        for true, row in enumerate(result["confusion"]):
            lines.append(f"    true count {true:<3}" + "".join(f"{n:>8,}" for n in row))
    return "\n".join(
        [*lines, f"Checkpoint, metrics and pictures (drawn in {seconds_for_pictures:.0f} s in all) are in {folder}"]
    )


# ------------------------------------------------------------------------------ the command line


class UsageError(Exception):
    """The flags ask for something that cannot be done."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults, of flags that have one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def make_parser(**options) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train Attend, Infer, Repeat on multi-MNIST or on images of your own, and count what is in images.",
        usage="%(prog)s [options]   (-h lists them)",
        formatter_class=Formatter,
        allow_abbrev=False,
        **options,
    )
    add = parser.add_argument
    add(
        "-n",
        "--num-steps",
        type=positive(int, 10**9),
        default=3000,
        help="steps of the whole run, also when it is resumed",
    )
    add("-b", "--batch-size", type=positive(int, 100_000), default=128, help="images per step")
    add(
        "-lr",
        "--learning-rate",
        type=positive(float, 10**6),
        default=2e-3,
        help="largest learning rate of model and guide",
    )
    add("-blr", "--baseline-learning-rate", type=positive(float, 10**6), default=2e-3, help="the baseline's largest")
    add("--estimator", choices=["tracegraph", "traceenum"], default="tracegraph", help="sample z_pres, or sum it out")
    add("--baseline", choices=["rnn", "average", "none"], help="tracegraph's, against variance; if not given, rnn")
    add(
        "--plain",
        action="store_true",
        help="the paper's guide: no second look, no exploration; a fixed prior on the count",
    )
    add("-t", "--model-steps", type=positive(int, 50), default=3, help="most objects in an image, T")
    add(
        "--likelihood-sd",
        type=positive(float, 10**6),
        default=0.3,
        metavar="SD",
        help="standard deviation of the noise on a pixel; the larger, the fewer objects are found",
    )
    add("--seed", type=seed, default=0, help="seed of training; the scenes are the same for everyone")
    add("--cuda", action="store_true", help="train on the GPU")
    add("--eval-every", type=positive(int), default=500, metavar="STEPS", help="evaluate on validation scenes")
    add("--viz-every", type=positive(int), default=500, metavar="STEPS", help="draw the pictures")
    add(
        "--visdom",
        choices=["auto", "on", "off"],
        default="auto",
        help="show the pictures on visdom; auto: if a server answers",
    )
    add("--visdom-server", default="http://localhost", metavar="URL", help="visdom's address")
    add("--visdom-port", type=positive(int, 65_535), default=8097, metavar="PORT", help="visdom's port")
    add("--visdom-env", default="air", metavar="NAME", help="visdom's environment that the windows are in")
    add("--save-every", type=positive(int), default=500, metavar="STEPS", help="write the checkpoint")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where digits and scenes are kept")
    add("--mnist-root", type=Path, metavar="DIR", help="a copy of MNIST you have, in torchvision's layout")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder, if not given runs/<date>-<time>-seed<seed>; with --predict, where pictures go",
    )
    add("--overwrite", action="store_true", help="if --out is the folder of an earlier run, replace that run")
    add("--load", type=Path, metavar="RUN", help="a run's folder or checkpoint: go on with it")
    add("--eval-only", action="store_true", help="with --load: evaluate on the test scenes, print one JSON object")
    add("--redraw", action="store_true", help="with --load: draw the run's pictures again")
    add("--report", action="store_true", help="with --load: measure in detail how well it does, write report.html")
    add("--data", type=absolute, metavar="NPZ", help="train on your own images; with --eval-only, evaluate on them")
    add("--test-data", type=absolute, metavar="NPZ", help="with --data: held-out images; if not given, the last tenth")
    add(
        "--predict",
        type=Path,
        metavar="PATH",
        help="with --load: count what is in an image, an .npz, or a folder of them",
    )
    add("--invert", action="store_true", help="with --predict: the images are dark on light")
    add("--json", type=Path, metavar="FILE", help="with --predict: where the results go; if not given, to stdout")
    return parser


def absolute(text: str) -> Path:
    """An argparse type: a path that a run can still be gone on with from another folder."""
    return Path(text).absolute()


def seed(text: str) -> int:
    """An argparse type: what every random number generator takes as a seed."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def positive(number: type, most: float = math.inf):
    """An argparse type: numbers greater than 0, finite, and not greater than `most`."""

    def parse(text: str):
        value = number(text)
        if not 0 < value <= most or value == math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{number.__name__} greater than 0" + (f", at most {most:,}" if most < math.inf else "")
    return parse


def adopt_flags(parser: argparse.ArgumentParser, argv: list[str] | None, checkpoint: dict) -> argparse.Namespace:
    """Parse again with the run's own flags as defaults; those that make the run what it is cannot change."""
    missing = {"step", "seconds", "flags", "optimizer", "rng", "cuda_rng", "averages"} - checkpoint.keys()
    flags = checkpoint["flags"] if isinstance(checkpoint.get("flags"), dict) else {}
    flags = {"likelihood_sd": 0.3} | flags  # what runs had before there was the flag
    missing |= {f"--{name.replace('_', '-')}" for name in (*KEPT, *FIXED) if name not in flags}
    if missing:
        raise CheckpointError(f"the checkpoint is not of a run of this script: it has no {', '.join(sorted(missing))}")
    # Nothing in a file is taken on trust: its flags are parsed as if they had been typed.
    typed = ["--plain"] if flags["plain"] is True else []
    unset = {"plain"} | {name for name in ("data", "test_data") if flags[name] is None}
    typed += [f"--{name.replace('_', '-')}={flags[name]}" for name in (*KEPT, *FIXED) if name not in unset]
    try:
        own = make_parser(exit_on_error=False).parse_args(typed)
    except argparse.ArgumentError as error:
        raise CheckpointError(f"the checkpoint's flags are not of this script: {error}") from None
    step, seconds = checkpoint["step"], checkpoint["seconds"]
    if not (isinstance(step, int) and 0 <= step <= own.num_steps and isinstance(seconds, float) and seconds >= 0):
        raise CheckpointError(f"the checkpoint cannot be of step {step!r} after {seconds!r} seconds")
    parser.set_defaults(**{name: getattr(own, name) for name in (*KEPT, *FIXED)})
    if parser.parse_args(argv).data != own.data:
        parser.set_defaults(test_data=None)  # It belongs to the other images.
    args = parser.parse_args(argv)
    for name in FIXED:
        if getattr(args, name) != getattr(own, name):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} {getattr(args, name)} contradicts the loaded run, which has {getattr(own, name)}"
            )
    if args.num_steps < step:
        raise UsageError(f"--num-steps {args.num_steps}: the run is already at step {step}")
    folder = args.load if args.load.is_dir() else args.load.parent
    in_place = not args.out or args.out.resolve() == folder.resolve()
    goes_on = not (args.eval_only or args.redraw or args.report or args.predict)
    if goes_on and in_place and (args.data, args.test_data) != (own.data, own.test_data):
        raise UsageError(f"{args.load} was trained on other images: name another folder to go on in with --out")
    return args


def check_flags(args) -> None:
    """Everything that can be known to be wrong before work starts. Fills in --out."""
    number, _, local_rank = Ranks.planned()
    if args.cuda and not torch.cuda.is_available():
        raise UsageError("--cuda: no CUDA device was found")
    if args.cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(f"--cuda: {torch.cuda.device_count()} CUDA devices are too few for torchrun's processes")
    instead = [
        f"--{name.replace('_', '-')}" for name in ("eval_only", "redraw", "report", "predict") if getattr(args, name)
    ]
    if instead and number > 1:
        raise UsageError(f"{instead[0]} is done by one process: leave torchrun out")
    if args.batch_size % number:
        raise UsageError(f"--batch-size {args.batch_size} cannot be shared equally by torchrun's {number} processes")
    if instead and not args.load:
        raise UsageError(f"{instead[0]} needs --load")
    if len(instead) > 1:
        raise UsageError(f"{' and '.join(instead)}: one at a time")
    for name in ("json", "invert"):
        if getattr(args, name) and not args.predict:
            raise UsageError(f"--{name} needs --predict")
    if args.predict and not args.predict.exists():
        raise UsageError(f"--predict: no such file or folder: {args.predict}")
    if args.json and os.path.lexists(args.json):
        raise UsageError(f"--json {args.json} is there already; name another file")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: no such folder: {args.json.parent}")
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise UsageError(f"--data-dir {args.data_dir} is not a folder")
    if args.mnist_root and not args.mnist_root.is_dir():
        raise UsageError(f"--mnist-root {args.mnist_root} is not a folder")
    if args.test_data and not args.data:
        raise UsageError("--test-data needs --data")
    if args.eval_only and args.out:
        raise UsageError("--out has no use with --eval-only, which writes no file")
    for name in ("redraw", "report"):
        if getattr(args, name) and args.out:
            raise UsageError(f"--out has no use with --{name}, which writes to the run's own folder")
        if getattr(args, name) and in_run_folder(args.load) and not os.access(args.load.parent, os.W_OK):
            raise UsageError(f"--{name}: {args.load.parent} cannot be written to")
    if args.report and args.data:
        raise UsageError("--report needs to know what is where: it is for runs on multi-MNIST, without --data")
    if args.overwrite and (args.load or not args.out):
        raise UsageError("--overwrite is for --out without --load")
    if args.load and not args.eval_only and not args.predict and not in_run_folder(args.load):
        if args.redraw or args.report:
            raise UsageError(f"--{'redraw' if args.redraw else 'report'}: {args.load} is not in the folder of a run")
        if not args.out:
            raise UsageError(f"{args.load} is not in the folder of a run: name a folder to go on in with --out")
    if args.eval_only or args.redraw or args.report or (args.predict and not args.out):
        return
    if args.estimator == "traceenum" and args.baseline not in (None, "none"):
        raise UsageError(f"--baseline {args.baseline} has no use with traceenum, which samples no z_pres")
    if args.baseline is None:
        args.baseline = "none" if args.estimator == "traceenum" else "rnn"
    if args.out is None:
        started = datetime.now().strftime("%Y%m%d-%H%M%S")
        args.out = args.load.parent if args.load else Path("runs", f"{started}-seed{args.seed}")
    nearest = next(path for path in (args.out, *args.out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"--out {args.out}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {args.out}: {nearest} cannot be written to")
    resumed = (
        args.load and not args.predict and in_run_folder(args.load) and args.out.resolve() == args.load.parent.resolve()
    )
    # Hidden files are the lock, and what a run that was killed had not finished writing.
    if not resumed and args.out.exists() and any(not file.name.startswith(".") for file in args.out.iterdir()):
        if not args.overwrite:
            choices = "name another folder" + (
                ", --load it to go on with that run, or --overwrite it" if not args.predict else ""
            )
            raise UsageError(f"--out {args.out} is not empty; {choices}")
        if not is_run_folder(args.out):
            raise UsageError(f"--overwrite: {args.out} is not empty, and not the folder of a run")


def is_run_folder(folder: Path) -> bool:
    """Whether there is a config.json of ours."""
    try:
        return json.loads((folder / "config.json").read_text()).keys() >= {"flags", "air", "versions"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def in_run_folder(checkpoint: Path) -> bool:
    """Whether this is a run's own checkpoint, not a copy or link of it somewhere else."""
    return checkpoint.name == "checkpoint.pt" and not checkpoint.is_symlink() and is_run_folder(checkpoint.parent)


if __name__ == "__main__":
    main()
