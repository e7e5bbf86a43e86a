"""Train Attend, Infer, Repeat on multi-MNIST, so that it learns to count without being told how.

python main.py                                        # train, evaluate, draw
python main.py --cuda -b 1024 -n 1500                 # on a GPU, where larger mini-batches take no more time
python main.py --data my-images/                       # with images of your own
python main.py --load runs/NAME                       # resume a run that was interrupted
python main.py --load runs/NAME --eval-only           # evaluate it on the test scenes
python predict.py runs/NAME IMAGES                    # count what is in images of your own
"""

import json
import math
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pyro
import torch

from air import AIR
from evaluation import evaluate, evaluate_images, interval, reference_stats
from training import run
from training.checkpoint import build_air, read_checkpoint, read_reference
from training.data import evaluation_scenes, load_scenes, own_images, pose_prior
from training.options import one_line_errors, parse
from training.parallel import Processes
from training.pictures import Pictures
from training.svi import check_finite, make_svi, schedule, skip_step


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", "Encountered NaN|.*not light on black")  # `skip_step` and images.py deal with it
    with one_line_errors("main.py"):
        args = parse(argv)
        if args.eval_only:
            print(json.dumps(evaluate_only(args)))
            return
        processes = Processes(args.cuda)
        resumes = args.load is not None and args.out.resolve() == args.load.parent.resolve()
        with run.claim(args.out, resumes) if processes.is_main else nullcontext():
            train(args, processes, resumes)
            processes.close()


def train(args, processes: Processes, resumes: bool) -> None:
    """Data, AIR, SVI, evaluation, pictures; with --load, from where that run was."""
    pictures = Pictures(args.out, args.visdom, args.visdom_env) if processes.is_main else None
    checkpoint = read_checkpoint(args.load)[0] if args.load else None
    size = checkpoint["air"]["image_size"] if checkpoint else None
    options = size, args.invert, args.max_objects, args.crop, args.object_size
    scenes = load_scenes(args.data, args.data_dir, processes, *options)
    train_scenes, validation_scenes, test_scenes, sha256, length = scenes
    if resumes and checkpoint["data_sha256"] != sha256:
        raise run.UsageError(f"{args.out} was trained on other images: name another folder to resume it in with --out")
    # This process's share, on its device; uint8: a mini-batch becomes floats when it is drawn.
    train_x = torch.from_numpy(train_scenes.x[processes.rank :: processes.world_size]).to(processes.device)

    pyro.clear_param_store()  # of an earlier run in the same process
    pyro.set_rng_seed(args.seed)
    if checkpoint:
        air = build_air(checkpoint, args.load)
    else:
        size = train_scenes.x.shape[1]
        prior = pose_prior(size, length) if length else {}
        air = AIR(args.max_objects, size, guide=args.guide, baseline=args.baseline, **prior)
    air.to(processes.device)
    processes.broadcast(air.state_dict().values())
    svi, adam = make_svi(air, args.estimator, processes)
    pyro.enable_validation(False)  # Its checks of every distribution take time; tests leave them on.

    flags, accuracy, skipped = run.plain_flags(args), "-", []
    state = run.begin(args.out, args.load, checkpoint, air, adam, processes, flags)
    if pictures and state.step == 0:
        pictures.show(air, "validation", validation_scenes)
    with run.stop_signals(processes), run.progress_bar(state, args.num_steps, processes) as advance:
        while state.step < args.num_steps and not processes.should_stop:
            started = time.perf_counter()
            index = torch.randint(len(train_x), (args.batch_size // processes.world_size,), device=train_x.device)
            rate = schedule(state.step, args.num_steps)
            for group, largest in zip(adam.param_groups, (args.learning_rate, args.baseline_learning_rate)):
                group["lr"] = rate * largest
            loss = svi.step(train_x[index].float() / 255)
            if not math.isfinite(loss):
                skip_step(state.step, skipped, processes.is_main)
                continue
            state.step, state.reference = state.step + 1, None
            state.seconds += time.perf_counter() - started
            advance(f"loss {loss / args.batch_size:.1f}, validation accuracy {accuracy}")

            if state.is_due(args.eval_every, args.num_steps):
                check_finite(air, adam, state.step)
                if processes.is_main:
                    metrics = evaluate(air, validation_scenes).metrics
                    run.record(args.out, "validation", state, metrics)
                    accuracy = "-" if metrics["count_accuracy"] is None else f"{metrics['count_accuracy']:.2%}"
                    if state.step == args.num_steps:
                        state.reference = reference_stats(air, train_scenes.x[:10_000], validation_scenes.x[:1000])
                run.save(args.out, air, adam, state, processes, flags, sha256)
            if pictures and state.is_due(args.viz_every, args.num_steps):
                pictures.show(air, "validation", validation_scenes)

        if processes.any_stop_signal():
            check_finite(air, adam, state.step)
            run.save(args.out, air, adam, state, processes, flags, sha256)
            if pictures:
                pictures.show(air, "validation", validation_scenes)
            run.exit_on_signal(processes, args.out, state.step)
    if processes.is_main:
        evaluation = evaluate(air, test_scenes, None, True, state.reference and state.reference.temperature)
        result = run.record(args.out, "test", state, evaluation.metrics)
        pictures.show(air, "test", test_scenes, evaluation)
        print(summary(result, args.out))


def evaluate_only(args) -> dict:
    """What would be a line of metrics.jsonl: on the run's test scenes, or on all images that --data names."""
    checkpoint, path = read_checkpoint(args.load)
    air = build_air(checkpoint, path).to("cuda" if args.cuda else "cpu")
    reference = read_reference(checkpoint, path)
    own = own_images(args.data, args.invert, air.image_size, args.object_size) if args.data else None
    canvases, scenes = own or (None, evaluation_scenes(checkpoint, args.data_dir))
    if canvases:
        metrics = evaluate_images(air, canvases, scenes.counts, reference, args.object_size)
    else:
        metrics = evaluate(air, scenes, args.max_objects, True, reference and reference.temperature).metrics
    split, state = "data" if args.data else "test", run.State(checkpoint["step"], checkpoint["seconds"])
    return run.metrics_line(split, state, metrics)


def summary(result: dict, folder: Path) -> str:
    """What a user wants to know at the end of a run."""
    images, minutes = result["images"], result["seconds"] / 60
    lines = [f"{images:,} held-out scenes, {result['step']:,} steps, {minutes:.1f} minutes of training"]
    ways = {"": "one sample of the guide", "_mode": "its most probable count", "_search": "the search"}
    for name, way in ways.items():
        if (accuracy := result[f"count_accuracy{name}"]) is not None:
            low, high = interval(accuracy, images)
            lines.append(f"  count accuracy   {accuracy:.2%} (95% interval {low:.2%} to {high:.2%}), by {way}")
    if result["calibration_error"] is not None:
        error, wrong = result["calibration_error"], result["sure_but_wrong"]
        lines.append(f"  its probability  is off by {error:.2%} on average; {wrong:.2%} are wrong although above 99%")
    lines.append(f"  ELBO             {result['elbo']:.1f} nats per image")
    for true, row in enumerate(result["confusion"] or ()):
        lines.append(f"  with {true} objects   0, 1, .. were found in {', '.join(f'{n:,}' for n in row)} scenes")
    return "\n".join([*lines, f"Checkpoint, metrics and pictures are in {folder}"])


if __name__ == "__main__":
    main()
