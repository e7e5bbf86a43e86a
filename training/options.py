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

from air import MAX_STEPS
from multi_mnist import DataError, one_line
from training.checkpoint import CheckpointError, read_checkpoint
from training.parallel import ProcessLost, launched
from training.run import RunError, is_run_folder
from training.svi import NonFiniteError

# What a run is: a resumed run has the same.
FROZEN_ON_RESUME = (
    "batch_size",
    "learning_rate",
    "baseline_learning_rate",
    "seed",
    "model_steps",
    "estimator",
    "baseline",
    "guide",
    "invert",
    "object_size",
)
# What a resumed run has too, if it is not told otherwise.
INHERITED_ON_RESUME = ("num_steps", "eval_every", "viz_every", "cuda", "data", "data_dir")
# What makes a difference to --eval-only.
EVALUATION = ("load", "eval_only", "cuda", "model_steps", "data", "data_dir", "invert")


class UsageError(Exception):
    """The flags ask for something that cannot be done."""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The flags, checked, and the checkpoint that --load names. Bad flags end the program with an error line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    checkpoint = None
    try:
        if args.load:
            checkpoint, path = read_checkpoint(args.load)
            args = inherit(parser, argv, checkpoint, path)
        check(args, parser)
    except (CheckpointError, UsageError, ValueError) as error:  # ValueError: a path that cannot be one
        parser.error(one_line(error))
    return args, checkpoint


def make_parser(**options) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train Attend, Infer, Repeat on multi-MNIST or on images of your own.",
        usage="%(prog)s [options]   (-h lists them)",
        formatter_class=Formatter,
        allow_abbrev=False,
        **options,
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "-n",
        "--num-steps",
        type=positive(int, 10**9),
        default=4500,
        metavar="STEPS",
        help="training steps in total, including those before a resume",
    )
    add(
        "-b",
        "--batch-size",
        type=positive(int, 100_000),
        default=128,
        metavar="IMAGES",
        help="images per training step",
    )
    rate = positive(float, 10**6)
    add("-lr", "--learning-rate", type=rate, default=4e-3, help="largest learning rate of model and guide")
    add("-blr", "--baseline-learning-rate", type=rate, default=4e-3, help="largest learning rate of the baseline")
    add(
        "--estimator",
        choices=["tracegraph", "traceenum"],
        default="tracegraph",
        help="gradient of the choice whether there is one more object: sample it, or sum over both",
    )
    add(
        "--baseline",
        choices=["rnn", "none"],
        help="a network that takes variance out of tracegraph's gradient (default: rnn; with traceenum none)",
    )
    add("--seed", type=seed, default=0, help="seed of training; the scenes are the same for all seeds")
    add("--cuda", action=argparse.BooleanOptionalAction, default=False, help="compute on the GPU (default: the CPU)")

    add = parser.add_argument_group("model and guide").add_argument
    add(
        "-t",
        "--model-steps",
        type=positive(int, MAX_STEPS),
        default=3,
        metavar="T",
        help="most objects to find in an image; an evaluation may allow more",
    )
    add("--guide", choices=["residual", "rnn"], default="residual", help="look at what is left, or the paper's RNN")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST and the scenes are kept")
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="your own images, a folder or a file; the last tenth is held out (default: multi-MNIST)",
    )
    add(
        "--invert",
        action=argparse.BooleanOptionalAction,
        help="whether the images in --data are dark on light (default: detected)",
    )
    add(
        "--object-size",
        type=object_size,
        metavar="SIZE",
        help="length of an object, in pixels or as a share of the canvas (default: a digit's; estimated with --data)",
    )

    add = parser.add_argument_group("what a run leaves").add_argument
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<date>-<time>-seed<seed>)")
    steps = {"type": positive(int), "default": 500, "metavar": "STEPS"}
    add("--eval-every", **steps, help="how often to evaluate on the validation scenes and save the checkpoint")
    add("--viz-every", **steps, help="how often to draw the pictures")
    add(
        "--visdom",
        type=visdom,
        default="auto",
        metavar="auto|off|URL",
        help="the visdom server that shows the pictures; auto: if one runs on this machine",
    )
    add("--visdom-env", type=visdom_env, default="air", metavar="NAME", help="the visdom environment of the pictures")

    add = parser.add_argument_group("existing runs").add_argument
    add("--load", type=Path, metavar="RUN", help="a run's folder or checkpoint: resume it, with its own flags")
    add(
        "--eval-only",
        action="store_true",
        help="with --load: evaluate on the test scenes (own images: the held-out tenth) or all of --data; print JSON",
    )
    return parser


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, of flags that have one."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False and "(default" not in action.help
        return super()._get_help_string(action) if shown else action.help


def seed(text: str) -> int:
    """An argparse type: what every random number generator takes as a seed."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def object_size(text: str) -> float:
    """An argparse type: a length in pixels, or a share."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


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


def positive(number: type, most: float = math.inf):
    """An argparse type: numbers greater than 0, finite, and not greater than `most`."""

    def parse(text: str):
        value = number(text)
        if not 0 < value <= most or value == math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{number.__name__} greater than 0" + (f", at most {most:,}" if most < math.inf else "")
    return parse


def inherit(parser: argparse.ArgumentParser, argv: list[str] | None, checkpoint: dict, path: Path):
    """Parse again with the run's own flags as defaults; those that make the run what it is cannot change."""
    names = (*INHERITED_ON_RESUME, *FROZEN_ON_RESUME)
    flags = checkpoint["flags"] if isinstance(checkpoint.get("flags"), dict) else {}
    missing = {"step", "seconds", "flags", "optimizer", "rng", "cuda_rng", "data_sha256", "usual"} - checkpoint.keys()
    missing |= {flag(name) for name in names if name not in flags}
    if missing:
        raise CheckpointError(f"{path} is not of a run of this script: it has no {', '.join(sorted(missing))}")
    # Nothing in a file is taken on trust: its flags are parsed as if they had been typed.
    typed = [
        (flag(name) if flags[name] else f"--no-{flag(name)[2:]}")
        if isinstance(flags[name], bool)
        else f"{flag(name)}={flags[name]}"
        for name in names
        if flags[name] is not None
    ]
    try:
        own, unknown = make_parser(exit_on_error=False).parse_known_args(typed)
        if unknown:
            raise argparse.ArgumentError(None, unknown[0])
    except argparse.ArgumentError as error:
        raise CheckpointError(f"{path} has flags that are not of this script: {error}") from None
    step, seconds = checkpoint["step"], checkpoint["seconds"]
    if not (isinstance(step, int) and 0 <= step <= own.num_steps and isinstance(seconds, float) and seconds >= 0):
        raise CheckpointError(f"{path} cannot be of step {step!r} after {seconds!r} seconds")
    checkpoint["flags"] = vars(own)
    parser.set_defaults(**{name: getattr(own, name) for name in names})
    if parser.parse_args(argv).eval_only:
        parser.set_defaults(data=None, invert=None)  # With it, --data is something else: images to evaluate on.
    args = parser.parse_args(argv)
    for name in FROZEN_ON_RESUME:
        if name in ("model_steps", "invert") and args.eval_only:
            continue  # More objects may be looked for than in training, in images that are stored in another way.
        if getattr(args, name) != getattr(own, name):
            raise UsageError(f"{flag(name)} {getattr(args, name)}: the loaded run has {getattr(own, name)}")
    if args.num_steps < step:
        raise UsageError(f"--num-steps {args.num_steps}: the run is already at step {step}")
    args.load = path
    return args


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(args, parser: argparse.ArgumentParser) -> None:
    """Everything that can be known to be wrong before work starts. Fills in --out."""
    world_size, _, local_rank = launched()
    if args.cuda and not torch.cuda.is_available():
        raise UsageError("--cuda: no CUDA device was found" + ("; --no-cuda computes on the CPU" if args.load else ""))
    if args.cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(f"--cuda: {torch.cuda.device_count()} CUDA devices are too few for torchrun's processes")
    if args.batch_size % world_size:
        raise UsageError(f"--batch-size {args.batch_size} cannot be divided equally among {world_size} processes")
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise UsageError(f"--data-dir {args.data_dir} is not a folder")
    if not args.data and args.invert is not None:
        raise UsageError("--invert and --no-invert need --data")
    if args.eval_only:
        if not args.load:
            raise UsageError("--eval-only needs --load")
        for name, value in vars(args).items():
            if name not in EVALUATION and value != parser.get_default(name):
                raise UsageError(f"{flag(name)} cannot be combined with --eval-only")
        if world_size > 1:
            raise UsageError("--eval-only cannot be combined with torchrun")
        return
    if args.estimator == "traceenum" and args.baseline == "rnn":
        raise UsageError("--baseline rnn cannot be combined with traceenum, which samples no z_pres")
    if args.baseline is None:
        args.baseline = "none" if args.estimator == "traceenum" else "rnn"
    if args.baseline == "none" and args.baseline_learning_rate != parser.get_default("baseline_learning_rate"):
        raise UsageError("--baseline-learning-rate: there is no baseline")
    # A run's own checkpoint, not a copy or link of it somewhere else, is resumed where it is.
    own = args.load and args.load.name == "checkpoint.pt" and not args.load.is_symlink()
    own = own and is_run_folder(args.load.parent)
    if not args.out:
        if args.load and not own:
            raise UsageError(f"{args.load} is not in the folder of a run: name a folder to resume it in with --out")
        started = datetime.now().strftime("%Y%m%d-%H%M%S")
        args.out = args.load.parent if args.load else Path("runs", f"{started}-seed{args.seed}")
    nearest = next(path for path in (args.out, *args.out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"--out {args.out}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {args.out}: {nearest} cannot be written to")
    # Hidden files are the lock, and what a run that was killed had not finished writing.
    used = args.out.exists() and any(file.name[0] != "." for file in args.out.iterdir())
    if used and not (own and args.out.resolve() == args.load.parent.resolve()):
        raise UsageError(
            f"--out {args.out} already exists and is not empty; name another folder, or --load it to resume"
        )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Within it, an error that a user can act on ends the program with one line."""
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
