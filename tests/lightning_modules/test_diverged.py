"""A training that did not work says so, and leaves nothing that looks as if it had."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lightning_modules.victim
from antidreambooth.diffusion.families.stable_diffusion import StableDiffusion
from antidreambooth.evaluation.results import read_results
from antidreambooth.files import LOCK
from cli import main
from lightning_modules import Pretraining, Victim
from lightning_modules.training import LOOK, Training
from tests.conftest import ROOT
from tests.helpers import fit_of_a_victim, refused, start
from tests.lightning_modules.test_victim import FAKE, FOLDERS, FULL, INVERSION, LORA


@pytest.fixture
def fit(small_model, photos, tmp_path):
    """Builds the arguments of a fit on the photos."""

    def build(*more, **settings):
        fixed = ["--model.training.prior.weight=0", "--checkpoint.every_n_train_steps=0"]
        return fit_of_a_victim(small_model, photos, tmp_path / "out", *fixed, *more, **settings)

    return build


@pytest.fixture
def pretraining(small_model, tmp_path):
    """The same of a base model."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    (folder / "captions.json").write_text(json.dumps(["a photo of a man"] * 20))

    def build(*more, steps=4):
        words = ["fit", f"--config={ROOT / 'configs' / 'pretraining.yaml'}", f"--data.folder={folder}"]
        words += [f"--model.backbone={small_model}", f"--model.steps={steps}", "--model.batch_size=4"]
        words += ["--model.warmup_steps=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
        return [*words, f"--trainer.default_root_dir={tmp_path / 'out'}", "--checkpoint.every_n_train_steps=0", *more]

    return build


@pytest.fixture
def broken(monkeypatch):
    """From a step on (counted from 1) the loss of a class of modules is NaN; or only a weight that no loss knows is."""

    def breaks(kind, step, weight=None):
        whole, watch = kind.training_step, kind.watch

        def broken_from_here(batch_idx):
            return weight is None and batch_idx + 1 >= step

        def watched(self, loss, batch_idx):
            watch(self, loss * torch.nan if broken_from_here(batch_idx) else loss, batch_idx)

        def training_step(self, batch, batch_idx):
            loss = whole(self, batch, batch_idx)
            if weight is not None and batch_idx + 1 >= step:
                with torch.no_grad():
                    weight(self).view(-1)[0] = torch.nan
            return loss * torch.nan if broken_from_here(batch_idx) else loss

        monkeypatch.setattr(kind, "watch", watched)
        monkeypatch.setattr(kind, "training_step", training_step)

    return breaks


def nothing_is_saved(folder):
    left = {path.name for path in folder.iterdir()}
    assert left <= {"tensorboard", "config.yaml", "checkpoints", "samples", "latents.safetensors", LOCK}


@pytest.mark.parametrize("config", FOLDERS)
def test_a_learning_rate_that_is_far_too_high_ends_the_fit(fit, tmp_path, config):
    refused(
        fit("--model.training.learning_rate=1e30", config=config, steps=6),
        "is no finite number any more in step ",
        " of 6: the training diverged, and nothing of it is saved; try a lower --model.training.learning_rate, ",
        "--trainer.precision 32-true or another base model",
    )
    nothing_is_saved(tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_step_is_named_in_which_the_loss_was_not_finite_first(fit, tmp_path, broken, step):
    broken(Victim, step)
    refused(fit(steps=4), f"error: the loss is no finite number any more in step {step} of 4: ")
    nothing_is_saved(tmp_path / "out")


def unused(module):
    """A weight that no prompt of a test reads: of a token that is in none."""
    return module.backbone.text_encoder.get_input_embeddings().weight


def test_a_weight_is_looked_at_whatever_the_loss_says(fit, tmp_path, broken):
    broken(Victim, 2, unused)
    refused(fit(steps=3), "error: a weight is no finite number any more in step 3 of 3: ")
    nothing_is_saved(tmp_path / "out")


def test_a_long_training_does_not_go_on_until_its_end(fit, broken, noted):
    broken(Victim, 2)
    steps = noted(Victim)
    refused(fit(steps=LOOK + 10), f"the loss is no finite number any more in step 2 of {LOOK + 10}")
    assert len(steps) == LOOK


def test_nothing_is_copied_from_the_device_in_each_step(fit, monkeypatch):
    looks, look = [], Training.weight_norm

    def noting(self):
        looks.append(self._seen)
        return look(self)

    monkeypatch.setattr(Training, "weight_norm", noting)
    main(fit("--checkpoint.every_n_train_steps=20", steps=2 * LOOK + 1))
    assert looks == [20, LOOK, 40, 2 * LOOK, 2 * LOOK + 1]


@pytest.mark.parametrize("weight", [None, unused])
def test_a_checkpoint_that_can_be_resumed_is_not_replaced_by_one_that_cannot(fit, tmp_path, broken, weight):
    broken(Victim, 3, weight)
    refused(fit("--checkpoint.every_n_train_steps=2", steps=6), " is no finite number any more in step ")
    kept = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_steps_are_counted_from_the_start_of_a_resumed_training(fit, broken):
    main(fit("--checkpoint.every_n_train_steps=2", "--trainer.max_steps=2", steps=6))
    broken(Victim, 5)
    again = ["--checkpoint.every_n_train_steps=2", "--ckpt_path=last"]
    refused(fit(*again, steps=6), "the loss is no finite number any more in step 5 of 6")


def test_a_grid_does_not_hide_the_reason(fit, broken, tmp_path):
    broken(Victim, 2)
    grid = "--trainer.callbacks=[{class_path: SampleGrid, init_args: {every_n_steps: 3, every_n_epochs: 0}}]"
    refused(fit(grid, steps=6), "the loss is no finite number any more in step 2 of 6")
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("config", FOLDERS)
def test_a_victim_that_learned_nothing_says_so(fit, tmp_path, config):
    warm_up = ["--model.optimization.schedule=constant_with_warmup", "--model.optimization.warmup_steps=9"]
    refused(
        fit(*warm_up, config=config, steps=1),  # the first learning rate of a warm-up is 0
        "nothing was learned: after step 1 every weight is as it was, bit for bit, so nothing is saved; try a higher",
        "--model.training.learning_rate, a shorter warm-up or more steps (--model.training.steps)",
    )
    nothing_is_saved(tmp_path / "out")


def test_a_surrogate_of_fsmg_is_a_victim(command, tmp_path):
    surrogate = "configs/dreambooth.yaml --model.training.learning_rate 1e30 --model.training.steps 3"
    arguments = command(f"--model.surrogate={surrogate} --model.training.prior.weight 0", config="fsmg")
    refused(arguments, "is no finite number any more in step ", "lower --model.training.learning_rate")
    assert not (tmp_path / "out" / "cloaked").exists()
    assert not list((tmp_path / "out").rglob("surrogate.json"))


def test_pretraining_that_diverges_is_no_base_model(pretraining, tmp_path, broken):
    broken(Pretraining, 3)
    refused(
        pretraining(), "the loss is no finite number any more in step 3 of 4", "try a lower --model.learning_rate, "
    )
    nothing_is_saved(tmp_path / "out")


def test_averaged_weights_are_looked_at(pretraining, tmp_path, broken):
    broken(Pretraining, 4, lambda module: next(module.averaged.parameters()))
    refused(pretraining(), "a weight is no finite number any more in step 4 of 4")
    nothing_is_saved(tmp_path / "out")


def test_pretraining_that_learned_nothing_says_so(pretraining, tmp_path):
    refused(
        pretraining("--model.warmup_steps=9", steps=1),
        "nothing was learned: after step 1",
        "--model.learning_rate, a shorter warm-up or more steps (--model.steps)",
    )
    nothing_is_saved(tmp_path / "out")


@pytest.mark.slow
def test_two_ranks_end_alike_where_one_of_them_diverges(fit, tmp_path):
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    process = start(fit(*ranks, "--trainer.callbacks+=tests.lightning_modules.rank_breaks.RankBreaks", steps=4))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert output.count("error: a weight is no finite number any more in step 4 of 4") == 2  # on each rank
    nothing_is_saved(tmp_path / "out")


# --- test ---


@pytest.fixture
def test(small_model, photos, tmp_path):
    """Arguments of a test of six pictures; more can be added."""

    def build(*more, config=FULL):
        words = ["test", f"--config={ROOT / 'configs' / config}.yaml", f"--data.reference_photos={photos}"]
        words += [f"--model.backbone={small_model}", "--model.generation.images=3", "--model.generation.batch=2"]
        words += ["--model.generation.sampling_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
        return [*words, f"--trainer.default_root_dir={tmp_path / 'out'}", FAKE, *more]

    return build


@pytest.mark.parametrize(
    ("config", "file"),
    [
        (FULL, "unet/diffusion_pytorch_model.safetensors"),
        (LORA, "pytorch_lora_weights.safetensors"),
        (INVERSION, "learned_embeds.safetensors"),
    ],
)
def test_a_victim_with_broken_weights_is_not_measured(fit, test, tmp_path, config, file):
    main(fit(config=config))
    path = tmp_path / "out" / FOLDERS[config] / file
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    refused(test(config=config), str(tmp_path / "out" / FOLDERS[config]))
    assert not (tmp_path / "out" / "measures.json").exists()


@pytest.fixture
def draws(monkeypatch):
    """Makes some of a victim's pictures one colour all over."""

    def make(which):
        drawn, count = lightning_modules.victim.sample, iter(range(99))

        def sample(*arguments):
            pictures = drawn(*arguments)
            for picture in pictures:
                if which(next(count)):
                    picture[:] = torch.tensor([0, 3, 0], dtype=torch.uint8)[:, None, None]
            return pictures

        monkeypatch.setattr(lightning_modules.victim, "sample", sample)

    return make


def test_black_pictures_are_no_protection(test, tmp_path, draws):
    draws(lambda number: True)
    refused(test("--model.adaptation=Untrained"), "all 6 pictures have one colour all over: this victim draws nothing")
    assert not (tmp_path / "out" / "measures.json").exists()
    assert not (tmp_path / "out" / "per_image.csv").exists()


def test_some_black_pictures_are_counted(test, tmp_path, draws):
    draws(lambda number: number in (1, 4))
    with pytest.warns(UserWarning, match="2 of 6 pictures have one colour all over: .* no protection"):
        main(test("--model.adaptation=Untrained"))
    assert json.loads((tmp_path / "out" / "measures.json").read_text())["blank"] == pytest.approx(1 / 3)
    with (tmp_path / "out" / "per_image.csv").open() as file:
        assert [row["blank"] for row in csv.DictReader(file)] == ["0.0", "1.0", "0.0"] * 2
    cell = tmp_path / "verdict" / "cells" / "one"
    shutil.copytree(tmp_path / "out", cell)
    names = {"person": "ada", "protection": "aspl", "budget": 8.0, "victim": "full", "condition": "nothing"}
    names |= {"cloak_seed": 0, "victim_seed": 0, "seconds": 1.0, "complete": True}
    (cell / "cell.json").write_text(json.dumps(names))
    (result,) = read_results(tmp_path / "verdict")
    assert result.blank == 2
    assert "blank" not in result.values


def test_pictures_that_show_something_have_no_more_columns_than_before(test, tmp_path):
    main(test("--model.adaptation=Untrained"))
    assert "blank" not in json.loads((tmp_path / "out" / "measures.json").read_text())
    with (tmp_path / "out" / "per_image.csv").open() as file:
        assert "blank" not in next(csv.reader(file))


def test_what_is_undefined_is_null_in_measures(test, tmp_path):
    bright = tmp_path / "bright"
    bright.mkdir()
    Image.fromarray(np.full((16, 16, 3), (255, 250, 245), np.uint8)).save(bright / "a.png")
    main(test("--model.adaptation=Untrained", "--model.faces.darkest=250", f"--data.reference_photos={bright}"))
    text = (tmp_path / "out" / "measures.json").read_text()
    means = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert means["fdfr"] == 1
    assert means["ism"] is None
    assert means["distance"] is None
    assert means["joint_ism"] == 0


def test_a_sampler_of_more_steps_than_the_schedule_has_is_named(test):
    words = test("--model.adaptation=Untrained", "--model.generation.sampling_steps=1001")
    refused(words, "error: --model.generation.sampling_steps is from 1 to 1000: got 1001")


def test_a_base_model_that_draws_no_numbers_is_named(test, tmp_path, monkeypatch):
    decode = StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents: decode(self, latents) * torch.nan)
    refused(
        test("--model.adaptation=Untrained"), "draws no pictures of 'a photo of sks person' but numbers that are not"
    )
    assert not (tmp_path / "out" / "images").exists()
