"""The flags of main.py and their rules: what a run may be asked for, and what a resumed one keeps."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

from air import MAX_OBJECTS
from multi_mnist import DataError, one_line
from training.checkpoint import read_checkpoint
from training.parallel import ProcessLost, launched
from training.run import UsageError, has_files
from training.svi import NonFiniteError

# On resuming, FIXED flags are what the run is, KEPT ones are kept unless told otherwise, others are as by default.
FIXED = """
    batch_size learning_rate baseline_learning_rate estimator baseline seed max_objects guide invert crop object_size
""".split()
KEPT = "num_steps cuda data_dir data eval_every viz_every".split()
EVALUATION = "cuda max_objects data_dir data invert object_size load eval_only".split()  # matter to --eval-only


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train Attend, Infer, Repeat on multi-MNIST or on images of your own.",
        usage="%(prog)s [options]   (-h lists them)",
        allow_abbrev=False,
    )

    def add(*names, help, **options):
        if "default" in options and "(default" not in help:
            help += " (default: %(default)s)"
        group.add_argument(*names, help=help, **options)

    steps, rate = {"type": positive(int), "metavar": "STEPS"}, {"type": positive(float), "default": 4e-3}
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("training")
    add("-n", "--num-steps", **steps, default=3000, help="training steps in total, with those before a resume")
    add("-b", "--batch-size", type=positive(int), default=128, metavar="IMAGES", help="images per training step")
    add("-lr", "--learning-rate", **rate, help="largest learning rate of model and guide")
    add("-blr", "--baseline-learning-rate", **rate, help="largest learning rate of the baseline")
    text = "gradient of the choice whether there is one more object: sample it, or sum over both"
    add("--estimator", choices=["tracegraph", "traceenum"], default="tracegraph", help=text)
    text = "a network that takes variance out of tracegraph's gradient (default: rnn; with traceenum none)"
    add("--baseline", choices=["rnn", "none"], help=text)
    add("--seed", type=int, default=0, help="seed of training; the scenes are the same for all seeds")
    add("--cuda", action=switch, default=False, help="compute on the GPU (default: the CPU)")

    group = parser.add_argument_group("model and guide")
    text = "most objects to find in an image; an evaluation may allow more"
    add("-t", "--max-objects", type=positive(int, MAX_OBJECTS), default=3, metavar="T", help=text)
    add("--guide", choices=["residual", "rnn"], default="residual", help="look at what is left, or the paper's RNN")

    group = parser.add_argument_group("data")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is kept")
    text = "your own images, a folder or a file; the last tenth is held out (default: multi-MNIST)"
    add("--data", type=Path, metavar="PATH", help=text)
    add("--invert", action=switch, help="whether the images in --data are dark on light (default: each is looked at)")
    text = "train on random crops of the images in --data, so wide (default: of large images, three objects)"
    add("--crop", type=positive(int), metavar="PIXELS", help=text)
    text = "length of an object in the images of --data (default: estimated)"
    add("--object-size", type=positive(float), metavar="PIXELS", help=text)

    group = parser.add_argument_group("what a run leaves")
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<date>-<time>-seed<seed>)")
    add("--eval-every", **steps, default=500, help="how often to evaluate and save the checkpoint")
    add("--viz-every", **steps, default=500, help="how often to draw the pictures")
    text = "the visdom server that shows the pictures; auto: if one runs on this machine"
    add("--visdom", default="auto", metavar="auto|off|URL", help=text)
    add("--visdom-env", default="air", metavar="NAME", help="the visdom environment of the pictures")

    group = parser.add_argument_group("existing runs")
    add("--load", type=Path, metavar="RUN", help="a run's folder or checkpoint: resume it, with its own flags")
    text = "with --load: evaluate on the test scenes (own images: the held-out tenth) or all of --data; print JSON"
    add("--eval-only", action="store_true", help=text)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, complete and checked. Raises DataError or UsageError for bad ones, before anything is begun."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.load:
        checkpoint, load = read_checkpoint(args.load)
        missing = {"step", "seconds", "flags", "optimizer", "rng", "cuda_rng", "data_sha256"} - checkpoint.keys()
        if missing or not checkpoint["flags"].keys() >= {*FIXED, *KEPT}:
            raise DataError(f"{load} is not of a run of this script")
        flags = {name: checkpoint["flags"][name] for name in FIXED + KEPT}
        # With --eval-only, --data is something else: images to evaluate on.
        own = ("data", "invert", "crop", "object_size")
        parser.set_defaults(**flags | (dict.fromkeys(own) if args.eval_only else {}))
        args = parser.parse_args(argv)
        args.load = load
        # More objects may be looked for than in training, in images that are stored in another way.
        free = ("max_objects", *own) if args.eval_only else ()
        for name in FIXED:
            if name not in free and getattr(args, name) != flags[name]:
                raise UsageError(f"{flag(name)} {getattr(args, name)}: the loaded run has {flags[name]}")
        if args.num_steps < checkpoint["step"]:
            raise UsageError(f"--num-steps {args.num_steps}: the run is already at step {checkpoint['step']}")
    check(args)
    if args.eval_only:
        for name, value in vars(args).items():
            if name not in EVALUATION and value != parser.get_default(name):
                raise UsageError(f"{flag(name)} cannot be combined with --eval-only")
    else:
        args.baseline = args.baseline or ("none" if args.estimator == "traceenum" else "rnn")
        if args.baseline == "none" and args.baseline_learning_rate != parser.get_default("baseline_learning_rate"):
            raise UsageError("--baseline-learning-rate: there is no baseline")
        args.out = run_folder(args.out, args.load, args.seed)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that cannot be combined, with one another or with this machine."""
    world_size, _, local_rank = launched()
    if args.cuda and not (torch.cuda.is_available() and local_rank < torch.cuda.device_count()):
        raise UsageError("--cuda: no CUDA device was found" + ("; --no-cuda computes on the CPU" if args.load else ""))
    if args.eval_only and not args.load:
        raise UsageError("--eval-only needs --load")
    if args.eval_only and world_size > 1:
        raise UsageError("--eval-only cannot be combined with torchrun")
    for name in ("invert", "crop", "object_size"):
        if getattr(args, name) is not None and not args.data:
            raise UsageError(f"{flag(name)} needs --data")
    if not 0 <= args.seed < 2**32:  # what every random number generator takes
        raise UsageError(f"--seed {args.seed} is not between 0 and {2**32 - 1}")
    if args.batch_size % world_size:
        raise UsageError(f"--batch-size {args.batch_size} cannot be divided equally among {world_size} processes")
    if args.estimator == "traceenum" and args.baseline == "rnn":
        raise UsageError("--baseline rnn cannot be combined with traceenum, which samples no z_pres")


def run_folder(out: Path | None, load: Path | None, seed: int) -> Path:
    """The folder that a run writes to. Raises UsageError if something else is there."""
    # A run's own checkpoint, not a copy or link of it somewhere else, is resumed where it is.
    own = load and load.name == "checkpoint.pt" and not load.is_symlink()
    own = own and all((load.parent / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if load and not own and not out:
        raise UsageError(f"{load} is not in the folder of a run: name a folder to resume it in with --out")
    out = out or (load.parent if load else Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"))
    if has_files(out) and not (own and out.resolve() == load.parent.resolve()):
        raise UsageError(f"--out {out} already exists and is not empty; name another folder, or --load it to resume")
    return out


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def positive(number: type, most: float = math.inf):
    """An argparse type: numbers greater than 0, finite, and not greater than `most`."""

    def parse(text: str):
        value = number(text)
        if not 0 < value <= most or value == math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{number.__name__} greater than 0" + (f", at most {most:,}" if most < math.inf else "")
    return parse


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Within it, an error that a user can act on ends the program with one line.

    With stderr closed, what would go there is dropped: Python would print it on stdout, among the results.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (DataError, UsageError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (OSError, NonFiniteError, ProcessLost) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
