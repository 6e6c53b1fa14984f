"""Two ranks under every strategy against one process that draws the same noise, with the real modules."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file
from torch.optim import AdamW
from torchvision.utils import save_image

from antidreambooth.attack.canvas import STEP
from antidreambooth.attack.objectives import Denoising
from antidreambooth.attack.parametrisation import Square
from antidreambooth.attack.perturbation import pixel_gradient
from antidreambooth.attack.pool import BEFORE
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import dreambooth_loss, training_mode
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.decoding import load_photos, to_float
from cli import EXPECTED
from datamodules import Protection
from lightning_modules import ASPL
from tests.conftest import ROOT
from tests.families.tiny import SIDE, save
from tests.lightning_modules.ranks import FLOWS, MEMBERS, RANKS, ROUNDS, SEED, STRATEGIES, SURROGATE, VICTIM

pytestmark = pytest.mark.slow

NAMES = list(STRATEGIES)
CPU = torch.device("cpu")
# Where no rank has all weights, hooks around the modules change the order in which autograd adds up the gradients of
# what is used several times: equal but for rounding, which AdamW's and PGD's signs then enlarge.
ROUNDED = ("zero-3", "fsdp")
# DeepSpeed's AdamW steps on a part of one flat tensor, which ends elsewhere than a weight does. Without AVX-512 that
# rounded one value of a victim otherwise in its last place (seen on a Zen 3).
FLAT = ("zero-1", "zero-2")
EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"


def every_expected_warning(test):
    """What the command line ignores, too."""
    for message in EXPECTED:
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


class Several:
    """One model that sees what several ranks see, one after the other, and steps with the mean of their gradients."""

    def __init__(self, backbone, training, number):
        self.backbone, self.training = backbone, training
        self.turns = [Turn(number, SEED, rank, RANKS) for rank in range(RANKS)]
        self.generators = [turn.generator(torch.device("cpu")) for turn in self.turns]

    def optimizer(self):
        return AdamW(self.backbone.learned(), lr=self.training.learning_rate, weight_decay=1e-2, fused=True)

    def step(self, optimizer, step, steps, instances, classes):
        gradients, learned = [], self.backbone.learned()
        for turn, generator in zip(self.turns, self.generators, strict=True):
            own, others = (
                turn.batches(steps, 2, len(part.mean), part.mean.device)[step] for part in (instances, classes)
            )
            rows = instances.rows(own), classes.rows(others)
            loss = dreambooth_loss(self.backbone, self.training, *rows, generator)
            gradients.append(torch.autograd.grad(loss, learned))
        for parameter, *parts in zip(learned, *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0)
        optimizer.step()

    def learn(self, instances, classes):
        optimizer = self.optimizer()
        with training_mode(self.backbone, self.training):
            for step in range(self.training.steps):
                self.step(optimizer, step, self.training.steps, instances, classes)

    def attack(self, originals, cloaked):
        with torch.no_grad():
            embedding = self.backbone.embed([self.training.instance_prompt])
        for _ in range(2):
            parts = []
            for generator in self.generators:
                draw = Denoising().draw(self.backbone, cloaked, generator)
                parts.append(pixel_gradient(Denoising(), self.backbone, cloaked, embedding, [draw], 4)[0])
            low, high = (originals - 8 * STEP).clamp(min=-1), (originals + 8 * STEP).clamp(max=1)
            cloaked = (cloaked + 0.8 * STEP * torch.stack(parts).mean(dim=0).sign()).clamp(low, high)
        return cloaked


@pytest.fixture(scope="module")
def base(small_model, tmp_path_factory):
    """The model, three photos, and latents of the class images that every run samples."""
    folder = tmp_path_factory.mktemp("strategies")
    generator = torch.Generator().manual_seed(0)
    (folder / "photos").mkdir()
    for name in "abc":
        save_image(torch.rand(3, 16, 16, generator=generator), folder / "photos" / f"{name}.png")
    return small_model, folder


@pytest.fixture(scope="module")
def started(base):
    """What two processes held at the end of each run, by name and rank."""
    model, folder = base
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    flow, names = save("flux", folder / "flow"), ",".join(NAMES)
    command = [sys.executable, "-m", "tests.lightning_modules.ranks", folder, model, flow, folder / "photos", names]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / f"rank-{rank}.log").open("w+")) for rank in range(RANKS)]
        processes = [
            subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert codes == [0, 0], (folder / "rank-0.log").read_text()[-3000:]
    return folder


def held(folder, run, rank=0):
    return load_file(folder / f"{run}-{rank}.safetensors")


def ingredients_of(model, folder, side):
    """The model, photos, and latents of the class images that every run samples."""
    backbone = load_backbone(str(model))
    images = to_float(torch.stack([photo.pixels for photo in load_photos(folder / "photos", side)]))
    pictures = class_images(backbone, backbone.defaults.class_prompt, 3, side)
    return backbone, images, backbone.encode_all(to_float(pictures), 4)


def rounds_of(base, images, classes):
    """Perturbation and weights after ROUNDS rounds of ASPL in one process."""
    training = SURROGATE.completed(base.defaults)
    theta, cloaked = deepcopy(base), images
    Full().apply(theta, training, seed=0)
    clean = base.encode_all(images, 4)
    perturbation = torch.zeros_like(images)
    for number in range(ROUNDS):
        prime = Several(deepcopy(theta), training, number)
        prime.learn(clean, classes)
        cloaked = prime.attack(images, images + perturbation)
        perturbation = cloaked - images
        after = Several(theta, training, number)
        after.generators = prime.generators
        after.learn(theta.encode_all(cloaked, 4), classes)
    return perturbation, theta


@pytest.fixture(scope="module")
def ingredients(base, started):
    model, folder = base
    return ingredients_of(model, folder, 16)


@pytest.fixture(scope="module")
def aspl(ingredients):
    return rounds_of(*ingredients)


@pytest.fixture(scope="module")
def flow(started):
    """The same for a tiny FLUX.1: the untouched model, then what there is after the rounds."""
    known = ingredients_of(started / "flow", started, SIDE)
    return known[0], rounds_of(*known)


@pytest.fixture(scope="module")
def victim(ingredients):
    """Weights of a victim after its steps in one process."""
    base, images, classes = ingredients
    training = VICTIM.completed(base.defaults, "full")
    theta = deepcopy(base)
    Full().apply(theta, training, seed=0)
    theta.unet.train(), theta.text_encoder.train()
    optimizer, instances = Several(theta, training, 0).optimizer(), base.encode_all(images, 4)
    for step in range(VICTIM.steps or 0):
        Several(theta, training, step).step(optimizer, 0, 1, instances, classes)
    return theta


def apart(tensors, trained, untrained):
    """How far weights are from the expected ones, as a share of how far training has moved those."""
    wanted = {name: value.detach() for name, value in trained.named_parameters() if value.requires_grad}
    assert {*wanted} <= {*tensors}
    before = dict(untrained.named_parameters())
    off, moved = (
        torch.cat([(value - other[name]).detach().double().flatten() for name, value in wanted.items()]).norm()
        for other in (tensors, before)
    )
    return float(off / moved)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process_that_draws_their_noise(started, ingredients, aspl, name):
    equal_one_process(started, f"{name}_aspl", name in ROUNDED, ingredients[0], *aspl)


@pytest.mark.parametrize("name", FLOWS)
def test_so_do_they_for_a_flow(started, flow, name):
    """But for rounding: in one of three runs a weight's last digit differed under DDP, too; why is not known."""
    untrained, after = flow
    equal_one_process(started, f"{name}_flow", True, untrained, *after)


def equal_one_process(started, run, rounded, untrained, perturbation, theta):
    """Whether both ranks hold what one process has made."""
    first, second = (held(started, run, rank) for rank in range(RANKS))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["stray"] == 0
    differ = (first["perturbation"] != perturbation).float().mean()
    if rounded:
        assert differ < 0.005
        assert apart(first, theta, untrained) < 0.01
    else:
        assert differ == 0
        assert apart(first, theta, untrained) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_two_parts_equals_one_in_one_go(started, name):
    for rank in range(RANKS):
        parts, whole = (held(started, f"{name}_{run}", rank) for run in ("parts", "aspl"))
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_a_pool_of_two_ranks_is_that_of_one_process_that_draws_their_noise(started, ingredients):
    base, images, classes = ingredients
    training, theta = SURROGATE.completed(base.defaults, "full"), deepcopy(base)
    Full().apply(theta, training, seed=0)
    optimizer, clean, members = Several(theta, training, 0).optimizer(), base.encode_all(images, 4), []
    length = (training.steps or 0) // MEMBERS
    for number in range(MEMBERS):
        several = Several(theta, training, number)
        several.generators = [replace(turn, number=BEFORE + number).generator(CPU) for turn in several.turns]
        with training_mode(theta, training):
            for step in range(length):
                several.step(optimizer, step, length, clean, classes)
        members.append(deepcopy(theta))
    cloaked = images
    for number in range(ROUNDS):
        attacked = Several(members[number % MEMBERS], training, number).attack(images, cloaked)
        cloaked = images + (attacked - images)  # adding what is kept rounds
    for rank in range(RANKS):
        found = held(started, "ddp_pool", rank)
        assert torch.equal(found["perturbation"], attacked - images)
        weights = dict(base.named_parameters())
        assert all(torch.equal(value, weights[name]) for name, value in found.items() if name in weights)


@pytest.mark.parametrize("run", ["ddp_pool", "ddp_gradient"])
def test_a_pool_and_timesteps_by_gradient_are_alike_on_all_ranks_and_resumed(started, run):
    first, *others = (held(started, name, rank) for name in (run, f"{run}-parts") for rank in range(RANKS))
    assert all(torch.equal(value, other[key]) for other in others for key, value in first.items())


def test_the_comparison_notices_weights_that_are_not_given_back(started, ingredients, aspl):
    perturbation, theta = aspl
    control = held(started, "ddp_control")
    assert torch.equal(control["perturbation"], held(started, "ddp_control", 1)["perturbation"])  # a weak test
    assert (control["perturbation"] != perturbation).float().mean() > 0.1
    assert apart(control, theta, ingredients[0]) > 0.5


def test_deepspeed_computes_in_bf16_as_ddp_does(started):
    """Autocast over fp32 weights, not a network that was cast."""
    zero, ddp, full = (held(started, name) for name in ("zero-2_bf16", "ddp_bf16", "ddp_aspl"))
    assert not torch.equal(ddp["perturbation"], full["perturbation"])
    weights = [key for key in ddp if key not in ("perturbation", "stray")]
    together = torch.cat([zero[key].flatten() for key in weights])
    assert (together.bfloat16() == together).float().mean() < 0.01
    if EXACT:
        assert all(torch.equal(value, zero[key]) for key, value in ddp.items())
    else:  # a difference in the last place becomes one of bf16: no larger than that of bf16 from fp32
        off, rounding = (torch.cat([(one[key] - ddp[key]).flatten() for key in weights]).norm() for one in (zero, full))
        assert off <= 1.5 * rounding
        assert (zero["perturbation"] != ddp["perturbation"]).float().mean() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_victim_of_two_ranks_equals_one_process_that_draws_their_noise(started, ingredients, victim, name):
    tensors = held(started, f"{name}_victim")
    allowed = 1e-3 if name in ROUNDED else 1e-6 if name in FLAT and not EXACT else 0
    assert apart(tensors, victim, ingredients[0]) <= allowed
    saved = dict(load_backbone(str(started / f"{name}_victim" / "model")).named_parameters())
    assert all(torch.equal(value, saved[key]) for key, value in tensors.items())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@every_expected_warning
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the file names a ModelCheckpoint
def test_what_two_ranks_wrote_one_goes_on_with(base, started, name, monkeypatch, tmp_path):
    """The record and the perturbation fit; from there on it is a run of one rank."""
    monkeypatch.setenv("PL_GLOBAL_SEED", str(SEED))
    monkeypatch.setenv("XDG_CACHE_HOME", str(started / "cache"))
    model, folder = base
    module = ASPL(backbone=str(model), surrogate=SURROGATE, pgd_steps=2, parametrisation=Square())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=ROUNDS + 1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = started / f"{name}_aspl" / "checkpoints" / f"epoch={ROUNDS - 1}.ckpt"
    data = Protection(str(folder / "photos"), resolution=16, parametrisation=Square())
    trainer.fit(module, data, ckpt_path=str(checkpoint))
    assert trainer.current_epoch == ROUNDS + 1
    moved = (module.perturbation - held(started, f"{name}_aspl")["perturbation"]).abs()
    assert 0 < moved.max() <= 2 * 0.8 * STEP + 1e-6  # one round of two steps from where they stopped
