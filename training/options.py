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
from training.checkpoint import CheckpointError, read_checkpoint
from training.parallel import ProcessLost, launched
from training.run import RunError, has_files, is_run_folder
from training.svi import NonFiniteError

# What becomes of a flag on resuming: it is what the run is, or is kept unless told otherwise. Others are as by default.
FIXED, KEPT = "fixed", "kept"


class UsageError(Exception):
    """The flags ask for something that cannot be done."""


def make_parser() -> tuple[argparse.ArgumentParser, dict, set]:
    """The parser; by flag's name, FIXED or KEPT; and the names of flags that make a difference to --eval-only."""
    parser = argparse.ArgumentParser(
        description="Train Attend, Infer, Repeat on multi-MNIST or on images of your own.",
        usage="%(prog)s [options]   (-h lists them)",
        allow_abbrev=False,
    )
    on_resume, evaluation = {}, set()

    def add(*names, help, resume=None, evaluates=False, **options):
        if options.get("default", False) is not False and "(default" not in help:
            help += " (default: %(default)s)"
        name = group.add_argument(*names, help=help, **options).dest
        on_resume.update({name: resume} if resume else {})
        evaluation.update({name} if evaluates else {})

    fixed, kept = {"resume": FIXED}, {"resume": KEPT}
    steps, rate = {"type": positive(int), "metavar": "STEPS"}, {"type": positive(float), "default": 4e-3}
    switch = {"action": argparse.BooleanOptionalAction, "evaluates": True}

    group = parser.add_argument_group("training")
    add("-n", "--num-steps", **steps, **kept, default=4500, help="training steps in total, with those before a resume")
    images = {"type": positive(int), "default": 128, "metavar": "IMAGES"}
    add("-b", "--batch-size", **images, **fixed, help="images per training step")
    add("-lr", "--learning-rate", **rate, **fixed, help="largest learning rate of model and guide")
    add("-blr", "--baseline-learning-rate", **rate, **fixed, help="largest learning rate of the baseline")
    text = "gradient of the choice whether there is one more object: sample it, or sum over both"
    add("--estimator", choices=["tracegraph", "traceenum"], default="tracegraph", **fixed, help=text)
    text = "a network that takes variance out of tracegraph's gradient (default: rnn; with traceenum none)"
    add("--baseline", choices=["rnn", "none"], **fixed, help=text)
    add("--seed", type=seed, default=0, **fixed, help="seed of training; the scenes are the same for all seeds")
    add("--cuda", **switch, **kept, default=False, help="compute on the GPU (default: the CPU)")

    group = parser.add_argument_group("model and guide")
    most = {"type": positive(int, MAX_OBJECTS), "default": 3, "metavar": "T", "evaluates": True}
    text = "most objects to find in an image; an evaluation may allow more"
    add("-t", "--max-objects", **most, **fixed, help=text)
    text = "look at what is left, or the paper's RNN"
    add("--guide", choices=["residual", "rnn"], default="residual", **fixed, help=text)

    group = parser.add_argument_group("data")
    place = {"type": Path, "evaluates": True}
    add("--data-dir", **place, **kept, default=Path("data"), metavar="DIR", help="where MNIST is kept")
    text = "your own images, a folder or a file; the last tenth is held out (default: multi-MNIST)"
    add("--data", **place, **kept, metavar="PATH", help=text)
    add(
        "--invert",
        **switch,
        **fixed,
        help="whether the images in --data are dark on light (default: each is looked at)",
    )
    text = "length of an object, in pixels or as a share of the canvas (default: a digit's; estimated with --data)"
    add("--object-size", type=positive(float), metavar="SIZE", **fixed, help=text)

    group = parser.add_argument_group("what a run leaves")
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<date>-<time>-seed<seed>)")
    text = "how often to evaluate on the validation scenes and save the checkpoint"
    add("--eval-every", **steps, **kept, default=500, help=text)
    add("--viz-every", **steps, **kept, default=500, help="how often to draw the pictures")
    text = "the visdom server that shows the pictures; auto: if one runs on this machine"
    add("--visdom", type=visdom, default="auto", metavar="auto|off|URL", help=text)
    text = "the visdom environment of the pictures"
    add("--visdom-env", type=visdom_env, default="air", metavar="NAME", help=text)

    group = parser.add_argument_group("existing runs")
    text = "a run's folder or checkpoint: resume it, with its own flags"
    add("--load", type=Path, metavar="RUN", evaluates=True, help=text)
    text = "with --load: evaluate on the test scenes (own images: the held-out tenth) or all of --data; print JSON"
    add("--eval-only", action="store_true", evaluates=True, help=text)
    return parser, on_resume, evaluation


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, complete and checked. Bad ones end the program with an error line, before anything is begun."""
    parser, on_resume, evaluation = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.load:
            checkpoint, load = read_checkpoint(args.load)
            missing = {"step", "seconds", "flags", "optimizer", "rng", "cuda_rng", "data_sha256"} - checkpoint.keys()
            missing |= on_resume.keys() - checkpoint.get("flags", {}).keys()
            if missing:
                raise CheckpointError(f"{load} is not of a run of this script: it has no {', '.join(sorted(missing))}")
            flags = {name: checkpoint["flags"][name] for name in on_resume}
            # With --eval-only, --data is something else: images to evaluate on.
            parser.set_defaults(**flags | ({"data": None, "invert": None} if args.eval_only else {}))
            args = parser.parse_args(argv)
            args.load = load
            # More objects may be looked for than in training, in images that are stored in another way.
            free = ("max_objects", "invert") if args.eval_only else ()
            for name, rule in on_resume.items():
                if rule == FIXED and name not in free and getattr(args, name) != flags[name]:
                    raise UsageError(f"{flag(name)} {getattr(args, name)}: the loaded run has {flags[name]}")
            if args.num_steps < checkpoint["step"]:
                raise UsageError(f"--num-steps {args.num_steps}: the run is already at step {checkpoint['step']}")
        check(args)
        if args.eval_only:
            for name, value in vars(args).items():
                if name not in evaluation and value != parser.get_default(name):
                    raise UsageError(f"{flag(name)} cannot be combined with --eval-only")
        else:
            args.baseline = args.baseline or ("none" if args.estimator == "traceenum" else "rnn")
            if args.baseline == "none" and args.baseline_learning_rate != parser.get_default("baseline_learning_rate"):
                raise UsageError("--baseline-learning-rate: there is no baseline")
            args.out = run_folder(args.out, args.load, args.seed)
    except (CheckpointError, UsageError, ValueError) as error:  # ValueError: a path that cannot be one
        parser.error(one_line(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that cannot be combined, with one another or with this machine."""
    world_size, _, local_rank = launched()
    if args.cuda and not torch.cuda.is_available():
        raise UsageError("--cuda: no CUDA device was found" + ("; --no-cuda computes on the CPU" if args.load else ""))
    if args.cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(f"--cuda: {torch.cuda.device_count()} CUDA devices are too few for torchrun's processes")
    if args.eval_only and not args.load:
        raise UsageError("--eval-only needs --load")
    if args.eval_only and world_size > 1:
        raise UsageError("--eval-only cannot be combined with torchrun")
    if args.batch_size % world_size:
        raise UsageError(f"--batch-size {args.batch_size} cannot be divided equally among {world_size} processes")
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise UsageError(f"--data-dir {args.data_dir} is not a folder")
    if not args.data and args.invert is not None:
        raise UsageError("--invert and --no-invert need --data")
    if args.estimator == "traceenum" and args.baseline == "rnn":
        raise UsageError("--baseline rnn cannot be combined with traceenum, which samples no z_pres")


def run_folder(out: Path | None, load: Path | None, seed: int) -> Path:
    """The folder that a run writes to. Raises UsageError if it cannot, or if something else is there."""
    # A run's own checkpoint, not a copy or link of it somewhere else, is resumed where it is.
    own = load and load.name == "checkpoint.pt" and not load.is_symlink() and is_run_folder(load.parent)
    if load and not own and not out:
        raise UsageError(f"{load} is not in the folder of a run: name a folder to resume it in with --out")
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = out or (load.parent if load else Path("runs", f"{started}-seed{seed}"))
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"--out {out}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {out}: {nearest} cannot be written to")
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


def seed(text: str) -> int:
    """An argparse type: what every random number generator takes as a seed."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def visdom(text: str) -> str:
    """An argparse type: where the pictures are shown."""
    if text not in ("auto", "off") and "://" not in text:
        # Not repeated: it may have a password in it.
        raise argparse.ArgumentTypeError("expected auto, off or a URL such as http://localhost:8097")
    return text


def visdom_env(text: str) -> str:
    """An argparse type: a name that a visdom server keeps as it is, and that can be part of its page's URL."""
    if set(text) & set("/\\+") or not text.strip("."):
        raise argparse.ArgumentTypeError(rf"expected a name without / \ and +, not {text!r}")
    return text


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Within it, an error that a user can act on ends the program with one line.

    With stderr closed, what would go there is dropped: Python would print it on stdout, among the results.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (CheckpointError, DataError, RunError, UsageError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (OSError, NonFiniteError, ProcessLost) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
