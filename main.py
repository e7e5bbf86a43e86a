"""Train Attend, Infer, Repeat on multi-MNIST, so that it learns to count without being told how.

python main.py                                        # train, evaluate, draw
python main.py --cuda -b 1024 -n 1500                 # on a GPU, where larger mini-batches take no more time
python main.py --data my-images/                       # with images of your own
python main.py --load runs/NAME                       # resume a run that was interrupted
python main.py --load runs/NAME --eval-only           # evaluate it on the test scenes
torchrun --nproc-per-node 4 main.py                   # train in four processes, on one machine or several

Then `python predict.py runs/NAME IMAGES` counts what is in images of your own, and
`python benchmarks/report.py runs/NAME` measures in depth how well it does.
"""

import json
import warnings
from pathlib import Path

import pyro
import torch

from air import AIR
from evaluation import evaluate, interval
from multi_mnist import Scenes, load_split
from training.checkpoint import build_air
from training.data import check_size, load_own_scenes, load_scenes, own_canvases, pose_prior
from training.options import one_line_errors, parse
from training.parallel import Processes
from training.pictures import Pictures
from training.run import Run, RunError, metrics_line
from training.svi import count_ratio, make_svi, schedule


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", "Encountered NaN")  # of Pyro's; `Run.skip_step` says it
    with one_line_errors("main.py"):
        args, checkpoint = parse(argv)
        if args.eval_only:
            print(json.dumps(evaluate_only(args, checkpoint)))
        else:
            train(args, checkpoint)


def train(args, checkpoint: dict | None) -> None:
    """Data, AIR, SVI, evaluation, pictures; with a checkpoint, from where it was saved."""
    processes = Processes(args.cuda)
    train_scenes, validation_scenes, test_scenes, data_sha256 = load_scenes(args, checkpoint, processes)
    # This process's share, on its device; uint8: a mini-batch becomes floats when it is drawn.
    train_x = torch.from_numpy(train_scenes.x[processes.rank :: processes.world_size]).to(processes.device)
    pictures = Pictures(args.out, args.visdom, args.visdom_env, args.seed) if processes.is_main else None

    pyro.clear_param_store()  # of an earlier run in the same process
    pyro.set_rng_seed(args.seed)
    if checkpoint:
        air = build_air(checkpoint, args.load)
        check_size(train_scenes, air)
    else:
        size, prior = train_scenes.x.shape[1], pose_prior(args, train_scenes, processes)
        air = AIR(args.model_steps, size, guide=args.guide, baseline=args.baseline, **prior)
    air.to(processes.device)
    processes.broadcast(air.state_dict().values())
    svi, adam = make_svi(air, args.estimator, processes)
    pyro.enable_validation(False)  # Its checks of every distribution take time; tests leave them on.

    def evaluate_and_draw(split: str, scenes: Scenes, record: bool, draw: bool) -> dict | None:
        """Evaluate on `scenes`; note it in metrics.jsonl, draw the pictures, or both."""
        if not processes.is_main or not (record or draw):
            return None
        run.check_parameters()
        if not record:  # For the pictures a part of the scenes will do.
            scenes = Scenes(*(None if part is None else part[:1000] for part in scenes))
        evaluation = evaluate(air, scenes, looks=air.attend.looks if run.step == args.num_steps else 1)
        line = run.record(split, evaluation) if record else None
        if draw:
            pictures.show(air, split, scenes, evaluation)
        return line

    with Run(args, air, adam, processes, data_sha256, checkpoint) as run:
        evaluate_and_draw("validation", validation_scenes, record=False, draw=run.step == 0)

        for x in run.mini_batches(train_x):
            rate = schedule(run.step, args.num_steps)
            for group, largest in zip(adam.param_groups, (args.learning_rate, args.baseline_learning_rate)):
                group["lr"] = rate * largest
            air.set_count_prior(count_ratio(run.step, args.num_steps, air.usual_window))
            run.finish_step(svi.step(x))

            evaluation_is_due, pictures_are_due = run.is_due(args.eval_every), run.is_due(args.viz_every)
            evaluate_and_draw("validation", validation_scenes, record=evaluation_is_due, draw=pictures_are_due)
            if evaluation_is_due:
                run.save()

        if processes.should_stop:
            evaluate_and_draw("validation", validation_scenes, record=False, draw=True)
            run.exit_on_signal()
        processes.close()
        result = evaluate_and_draw("test", test_scenes, record=True, draw=True)
    if result:
        print(summary(result, run.folder))


def evaluate_only(args, checkpoint: dict) -> dict:
    """What would be a line of metrics.jsonl: on the run's test scenes, or on all images that --data names."""
    air = build_air(checkpoint, args.load).to("cuda" if args.cuda else "cpu")
    trained_on = checkpoint["flags"]["data"]
    split = "data" if args.data else "test"
    if args.data:
        scenes = own_canvases(args.data, air.image_size, args.invert)
    elif trained_on:
        _, scenes, sha256 = load_own_scenes(trained_on, args, air.image_size, checkpoint["flags"]["invert"])
        if sha256 != checkpoint["data_sha256"]:
            raise RunError(f"{trained_on} has other images than the run was trained on: evaluate on all, with --data")
    else:
        scenes = load_split("test", args.data_dir)
    check_size(scenes, air)
    metrics = evaluate(air, scenes, args.model_steps, air.attend.looks).metrics
    return metrics_line(split, checkpoint["step"], checkpoint["seconds"], metrics)


def summary(result: dict, folder: Path) -> str:
    """What a user wants to know at the end of a run."""

    def with_interval(accuracy: float) -> str:
        low, high = interval(accuracy, result["images"])
        return f"{accuracy:.2%} (95% interval {low:.2%} to {high:.2%})"

    minutes = result["seconds"] / 60
    lines = [f"{result['images']:,} held-out scenes, {result['step']:,} steps, {minutes:.1f} minutes of training"]
    if result["count_accuracy"] is not None:
        lines += [
            f"  count accuracy   {with_interval(result['count_accuracy'])}, by one sample of the guide",
            f"                   {with_interval(result['count_accuracy_mode'])}, by its most probable count",
        ]
    if result["count_accuracy_looks"] is not None:
        lines.append(
            f"                   {with_interval(result['count_accuracy_looks'])}, by the best of several looks"
        )
    lines += [
        f"  ELBO             {result['elbo']:.1f} nats per image",
        f"  last step used   in {result['last_step_rate']:.2%} of the images",
    ]
    if result["confusion"]:
        lines.append("  inferred count  " + "".join(f"{count:>8}" for count in range(len(result["confusion"][0]))))
        for true, row in enumerate(result["confusion"]):
            lines.append(f"    true count {true:<3}" + "".join(f"{n:>8,}" for n in row))
    return "\n".join([*lines, f"Checkpoint, metrics and pictures are in {folder}"])


if __name__ == "__main__":
    main()
