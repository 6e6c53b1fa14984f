"""What one rank does in the test of the strategies: the real modules under each of them, in one process group.

Run by test_strategies.py, with torchrun's variables set, as
``python -m tests.lightning_modules.ranks OUT MODEL FLOW PHOTOS NAMES``.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from safetensors.torch import save_file

from antidreambooth.attack.objectives import Denoising
from antidreambooth.attack.parametrisation import Square
from antidreambooth.diffusion.densities import LargestGradient
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.weights import Weights
from callbacks import TrainedModel
from datamodules import Protection, Subject
from lightning_modules import ASPL, DDP, FSDP2, DeepSpeed, MetaCloak, Victim
from lightning_modules.running.sharding import gathered
from tests.families.tiny import SIDE

SURROGATE = DreamBooth(learning_rate=1e-3, batch_size=2, steps=2, prior=PriorPreservation(weight=0.5, images=3))
VICTIM = DreamBooth(learning_rate=1e-3, batch_size=2, steps=4, prior=PriorPreservation(weight=0.5, images=3))
FLOWS = ("ddp", "fsdp")  # strategies that are tried on a flow, too: weights whole and split
ROUNDS = 2
RANKS = 2
MEMBERS = 2  # of a pool
SEED = 5


class DeepSpeedCPU(DeepSpeed):
    """DeepSpeed without a GPU, which Lightning refuses."""

    def setup_environment(self):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute
        self.parallel_devices = [torch.device("cpu", i) for i in range(RANKS)]
        super(DeepSpeedStrategy, self).setup_environment()


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDP,
    "zero-1": lambda: DeepSpeedCPU(stage=1),
    "zero-2": lambda: DeepSpeedCPU(stage=2),
    "zero-3": lambda: DeepSpeedCPU(stage=3),
    "fsdp": FSDP2,
}


class Held(Callback):
    """Writes what this rank holds at the end."""

    def __init__(self, file):
        self.file = file

    def on_fit_end(self, trainer, module):
        held = module.backbone
        whole = gathered(trainer.strategy, held) if module.together else dict(held.named_parameters())
        tensors = {k: v.detach().clone() for k, v in whole.items() if module.together or v.requires_grad}
        if isinstance(module, ASPL):
            tensors["perturbation"] = module.perturbation
            stray = [p.grad.abs().max() for p in held.parameters() if p.grad is not None and p.grad.numel()]
            tensors["stray"] = torch.stack([*map(torch.as_tensor, stray), torch.zeros(())]).max().reshape(1)
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.file)


class Begun(Callback):
    """A run that goes on does not start anew, which would end with the same."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_start(self, trainer, module):
        assert trainer.current_epoch == self.epoch


def fit(out, name, module, data, epochs, checkpoint=None, precision="32-true", **flags):
    """One fit, which keeps the checkpoint of every round; returns that of the first one."""
    root = out / name
    begun = Begun(1 if checkpoint else 0)
    kept = ModelCheckpoint(root / "checkpoints", "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=STRATEGIES[name.split("_")[0]](),
        precision=precision,
        plugins=[TorchElasticEnvironment()],
        max_epochs=epochs,
        default_root_dir=root,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Held(out / f"{name}-{os.environ['RANK']}.safetensors"), kept, begun, *flags.pop("callbacks", [])],
        **flags,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return root / "checkpoints" / "epoch=0.ckpt"


def main(out, model, flow, photos, names):
    """Every strategy: ASPL in one go, in two parts, weights not given back, a flow, a victim; a pool; timesteps."""
    for name in names:
        protect = lambda: Protection(photos, resolution=16, parametrisation=Square())  # noqa: E731
        aspl = lambda: ASPL(backbone=model, surrogate=SURROGATE, pgd_steps=2, parametrisation=Square())  # noqa: E731
        half = fit(out, f"{name}_aspl", aspl(), protect(), ROUNDS)
        fit(out, f"{name}_parts", aspl(), protect(), ROUNDS, half)
        fit(
            out,
            f"{name}_victim",
            Victim(backbone=model, training=VICTIM),
            Subject(photos, resolution=16, steps=4),
            1,
            callbacks=[TrainedModel()],
        )
    for name in ("ddp", "zero-2"):
        fit(out, f"{name}_bf16", aspl(), protect(), ROUNDS, precision="bf16-mixed")
    square = {"backbone": model, "surrogate": SURROGATE, "pgd_steps": 2, "parametrisation": Square()}
    for name, made in (
        ("ddp_pool", lambda: MetaCloak(members=MEMBERS, objective=Denoising(), **square)),
        ("ddp_gradient", lambda: ASPL(objective=Denoising(LargestGradient(2, visits=1)), **square)),
    ):
        half = fit(out, name, made(), protect(), ROUNDS)
        fit(out, f"{name}-parts", made(), protect(), ROUNDS, half)
    for name in FLOWS:
        module = ASPL(backbone=flow, surrogate=SURROGATE, pgd_steps=2, parametrisation=Square())
        fit(out, f"{name}_flow", module, Protection(photos, resolution=SIDE, parametrisation=Square()), ROUNDS)
    with patch.object(Weights, "restore", lambda self, kept: None):
        fit(out, "ddp_control", aspl(), protect(), ROUNDS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ["PL_GLOBAL_SEED"] = str(SEED)
    folder, base, other, pictures, wanted = sys.argv[1:]
    main(Path(folder), base, other, pictures, wanted.split(","))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # FSDP2 on gloo may abort at the interpreter's end, after success
