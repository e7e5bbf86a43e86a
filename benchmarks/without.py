"""main.py without one of the parts that it adds to the paper: what is that part good for?

    python benchmarks/without.py peak --seed 1          # what follows the part is for main.py
    python benchmarks/seeds.py --without peak --whole --seeds 0 1 2 -- -n 1000

(`main.py --guide rnn` does without the guide that looks at the residual.)
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from pyro import poutine

sys.path.insert(0, str(Path(__file__).parent.parent))

import air
import evaluation
import main
from air import AIR
from modules import Decoder, ResidualAttention, image_to_object, to_channels


def whole_likelihood(self, x=None, num_scenes=1, max_objects=None, model=AIR.model):
    """AIR.model, but "x" is observed as it is sampled: every choice is charged with how well the whole image fits."""
    if x is None:
        return model(self, x, num_scenes, max_objects)
    return poutine.condition(model, {"x": x})(self, None, len(x), max_objects)


def centre(self, residual, within):
    """ResidualAttention.peak, but the centre of all that is left, `[batch, 2]`, as a soft attention would have it."""
    weight = residual / residual.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    return torch.stack([weight.sum(-2) @ self.centres, weight.sum(-1) @ self.centres], -1)


def crop_with_gradient(self, z_where, x, canvas):
    """AIR.crop of the residual guide, but its gradient also passes through the canvas."""
    return image_to_object(z_where, to_channels(x - canvas, x), self.window_size)


# name: what is replaced and by what, (object, attribute, replacement) each
PARTS = {
    # How well the baseline predicts gains cannot be measured without them.
    "gains": [(AIR, "model", whole_likelihood), (evaluation, "baseline_r2", lambda *_: None)],
    "prior": [(main, "AIR", partial(AIR, count_ratio=1.0))],  # a uniform one instead
    "peak": [(ResidualAttention, "peak", centre)],
    "stop-gradient": [  # at the canvas that the guide sees
        (ResidualAttention, "residual", ResidualAttention.residual.__wrapped__),
        (AIR, "crop", crop_with_gradient),
    ],
    "bias": [(air, "Decoder", partial(Decoder, bias=0.0))],  # with which objects are nearly empty at first
}


@contextmanager
def left_out(part: str | None) -> Iterator[None]:
    """Within it, that part is left out, if any. What was trained without it is to be looked at without it as well."""
    with ExitStack() as stack:
        for replacement in PARTS[part] if part else ():
            stack.enter_context(mock.patch.object(*replacement))
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="main.py without one of its parts.", allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of main.py")
    args = parser.parse_args()
    with left_out(args.part):
        main.main(args.flags)
