"""main.py without one of the parts that it adds to the paper: what is that part good for?

    python benchmarks/without.py exploration --seed 1          # what follows the part is for main.py
    python benchmarks/seeds.py --without exploration --whole --seeds 0 1 2 --out runs/exploration -- -n 1000

(`main.py --guide rnn` does without the guide that looks at what is left.)
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import air
import evaluation
import main
from air import AIR
from modules import Decoder, ResidualAttention, image_to_object


def one_likelihood(self, x, num_steps=None):
    """AIR.model with the likelihood in one piece: every choice is charged with how well the whole image fits."""
    if torch.is_grad_enabled():
        self.register_parameters()
    with pyro.plate("scenes", len(x), dim=-1, device=x.device):
        z_pres, z_where, z_what = self.prior(len(x), num_steps or self.num_steps)
        canvases = self.canvases(z_where, z_what)
        canvas = canvases[0]
        for present, before, after in zip(z_pres, canvases, canvases[1:]):
            canvas = canvas + present[:, None, None] * (after - before)
        pyro.sample("x", dist.Normal(canvas, self.likelihood_sd).to_event(2), obs=x)


def mean_place(self, residual):
    """ResidualAttention.place, but the centre of all that is left, `[batch, 2]`, as a soft attention would have it."""
    weight = residual / residual.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    return torch.stack([weight.sum(-2) @ self.centres, weight.sum(-1) @ self.centres], -1)


def crop_with_gradient(self, z_where, x, canvas, window_size):
    """ResidualAttention.crop, but its gradient also passes through the canvas."""
    return image_to_object(z_where, torch.cat([x - canvas, x], -1), window_size)


# name: (object, attribute, what it is replaced by), ..
PARTS = {
    # How well the baseline predicts gains cannot be measured without them.
    "gains": [(AIR, "model", one_likelihood), (evaluation, "baseline_r2", lambda *_: None)],
    "prior": [(main, "count_ratio", lambda *_: 1.0)],
    "exploration": [(main, "AIR", partial(AIR, exploration=0.0))],
    "thickening": [(ResidualAttention, "residual", lambda self, x, canvas: (x - canvas.detach()).clamp(min=0))],
    "place": [(ResidualAttention, "place", mean_place)],
    "stop-gradient": [  # at the canvas that the guide sees
        (ResidualAttention, "residual", ResidualAttention.residual.__wrapped__),
        (ResidualAttention, "crop", crop_with_gradient),
    ],
    "bias": [(air, "Decoder", partial(Decoder, bias=0.0))],  # with which objects are nearly empty at first
    "clipping": [(main, "make_svi", partial(main.make_svi, clip=False))],
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="main.py without one of its parts.", allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of main.py")
    args = parser.parse_args()
    for replacement in PARTS[args.part]:
        setattr(*replacement)
    main.main(args.flags)
