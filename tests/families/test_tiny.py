"""The tiny models and their oracle, by themselves."""

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tests.families.conftest import same
from tests.families.oracle import flow_of, is_diffusion, load
from tests.families.tiny import TINY, build

UNMOVED = ("flux-schnell",)  # by guidance


def test_a_tiny_model_follows_from_its_seed():
    def weights(name: str, seed: int) -> Tensor:
        parts = [part for part in build(name, seed).components.values() if isinstance(part, torch.nn.Module)]
        return torch.cat([weight.flatten().double() for part in parts for weight in part.state_dict().values()])

    state = torch.get_rng_state()
    for name in TINY:
        first, again, other = weights(name, 0), weights(name, 0), weights(name, 1)
        assert first.isfinite().all(), name
        assert torch.equal(first, again), name
        assert not torch.equal(first, other), name
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_folder_is_small_and_holds_no_pickles(case):
    files = [file for file in case.folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}
    most = 1.5e6 if case.name == "z-image" else 1e6  # Z-Image's class has layers of fixed size
    assert sum(file.stat().st_size for file in files) < most


def test_the_oracle_comes_back_to_clean_latents(case):
    """With the true target the official schedulers find the latents again, so rows and noise belong together."""
    oracle, config = case.oracle, dict(load(case.folder).scheduler.config)
    for i, row in enumerate(oracle.rows.tolist()):
        if is_diffusion(config):
            scheduler = DDPMScheduler.from_config(config, clip_sample=False)
            clean = scheduler.step(oracle.target[i], row, oracle.noisy[i]).pred_original_sample
        else:
            scheduler = flow_of(config)
            place = len(scheduler.timesteps) - 1 - row
            scheduler.set_begin_index(place)
            scheduler.sigmas[place + 1 :] = 0  # the next step is Euler's to the end
            clean = scheduler.step(oracle.target[i], oracle.times[i], oracle.noisy[i]).prev_sample
        same(clean, oracle.clean[i], atol=1e-4)


def test_the_oracle_draws_pictures_of_the_prompts(case):
    plain, guided = case.oracle.drawing, case.oracle.guided
    for drawing in (plain, guided):
        assert drawing.pictures.isfinite().all()
        assert drawing.latents.isfinite().all()
        assert (drawing.pictures.amax((2, 3)) - drawing.pictures.amin((2, 3)) > 0.01).all()
    assert torch.equal(plain.latents, guided.latents) == (case.name in UNMOVED)
    assert torch.equal(plain.steps[0].noisy, case.oracle.start)
    one, other = case.oracle.told["prompt_embeds"]  # Z-Image's have lengths of their own
    both = min(len(one), len(other))
    assert not torch.allclose(one[:both], other[:both], atol=1e-3)


def test_sanas_solver_has_the_law_that_its_shift_says():
    """The solver of 999 steps stops at every row but the noisiest."""
    solver = build("sana").scheduler
    solver.set_timesteps(999)
    sigmas = flow_of(solver.config).sigmas[1:-1]
    same(solver.sigmas[: len(sigmas)], sigmas)
