"""How often each timestep is drawn."""

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from antidreambooth.diffusion.densities import LogitNormal, Uniform
from antidreambooth.errors import InputError

DRAWS, ROWS = 40_000, 1000


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 2.0)])
def test_logit_normal_is_diffusers_counted_from_the_clean_end(mean, std):
    drawn = LogitNormal(mean, std)(DRAWS, ROWS, torch.Generator().manual_seed(0))
    # Theirs counts from the noisy end, so that a mean has the other sign.
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", DRAWS, logit_mean=-mean, logit_std=std, generator=torch.Generator().manual_seed(1)
    )
    expected = ROWS - 1 - (theirs * ROWS).long()
    deciles = torch.linspace(0.1, 0.9, 9)
    apart = (drawn.float().quantile(deciles) - expected.float().quantile(deciles)).abs()
    assert apart.max() < 0.02 * ROWS
    assert drawn.min() >= 0
    assert drawn.max() < ROWS


def test_uniform_draws_each_row_alike():
    drawn = Uniform()(DRAWS, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=10).float().div(DRAWS).sub(0.1).abs().max() < 0.01


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(InputError, match="std is above 0"):
        LogitNormal(std=0.0)
