"""The result: cloaked photos, the manifest, the comparison picture."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm import tqdm

from antidreambooth.attack.parametrisation import Finished
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.quality import cloak_quality
from antidreambooth.files import replacing, write_atomically, write_json
from antidreambooth.photos.decoding import Photo
from antidreambooth.photos.delivery import cloaked_names, write_png
from antidreambooth.photos.whole import WholePhoto
from antidreambooth.provenance import MANIFEST, describe, read_manifest, versions
from callbacks.comparison import comparison
from callbacks.disk_space import for_all_ranks, require_room, require_writable
from callbacks.show import show

log = logging.getLogger("antidreambooth")


class CloakedPhotos(Callback):
    """Writes ``cloaked/``, ``manifest.json`` and ``comparison.png``, and on the way ``progress/round-NNN/``.

    The module has ``perturbation``, ``attack``, ``rounds``, ``passes`` and ``record()``.

    Args:
        every_n_epochs: rounds (epochs) between two looks at the photos so far; 0 switches them off.
    """

    def __init__(self, every_n_epochs: int = 10) -> None:
        require("every_n_epochs", every_n_epochs, 0)
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds out before any work whether the results can be written."""
        root = Path(trainer.default_root_dir)
        photos: list[Photo] = trainer.datamodule.photos  # type: ignore[attr-defined]
        looks = 3 + (trainer.max_epochs or 0) // self.every_n_epochs if self.every_n_epochs else 3
        whole = sum(photo.size[0] * photo.size[1] * 3 for photo in photos if isinstance(photo, WholePhoto))
        needed = looks * sum(photo.pixels.numel() for photo in photos) + 2 * whole
        for_all_ranks(trainer, lambda: require_writable(root))
        for_all_ranks(trainer, lambda: require_room(root, needed))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for the checkpoint, whose size is known now: the old one stays until the new one is there."""
        if trainer.checkpoint_callback is not None:
            root = Path(trainer.default_root_dir)
            size = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            existing = sum(file.stat().st_size for file in root.glob("checkpoints/*.ckpt"))
            for_all_ranks(trainer, lambda: require_room(root, 2 * size - existing))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The photos so far, when they are due."""
        number = trainer.current_epoch + 1
        if not self.every_n_epochs or number % self.every_n_epochs or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        state, budget = self._state(trainer, pl_module), cast(Any, pl_module).attack.budget
        cloaked = data.parametrisation.shown(data.canvas, state, data.photos, budget)
        for name, picture in zip(cloaked_names([photo.name for photo in data.photos]), cloaked, strict=True):
            write_png(Path(trainer.default_root_dir) / "progress" / f"round-{number:03d}" / name, picture)
        show(trainer, "cloaked", cloaked, columns=4, step=number)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The result."""
        self._write(trainer, pl_module, complete=True)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """What there is, when the run is told to stop after a round at least; a finished result stays."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or not trainer.is_global_zero:
            return
        before = read_manifest(Path(trainer.default_root_dir))
        if before and before.get("complete", True):
            log.warning("interrupted: the finished result of an earlier run stays, that of this one is not written")
        elif rounds_of(trainer, pl_module):
            log.warning("told to stop: writing the photos as they are now; Ctrl-C leaves without that")
            try:
                with heeding_ctrl_c():
                    self._write(trainer, pl_module, complete=False)
            except InputError as error:  # the interruption is what ends the run
                log.warning(str(error))
            except KeyboardInterrupt:
                log.warning("told to stop once more: no photo is written; an earlier result is as it was")

    def _write(self, trainer: Trainer, pl_module: Any, complete: bool) -> None:
        if not trainer.is_global_zero:
            return
        root, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        state, budget = self._state(trainer, pl_module), pl_module.attack.budget
        entries: list[dict[str, Any]] = []
        seen: list[tuple[Tensor, Tensor]] = []
        allowed = int(budget)  # the most that any pixel may change
        finished = data.parametrisation.finish(data.canvas, state, data.photos, budget, data.delivery)
        names = cloaked_names([photo.name for photo in data.photos])
        pixels = sum(width * height for width, height in (photo.size for photo in data.photos))
        bar = tqdm(desc="writing photos", total=pixels, unit="pixel", unit_scale=True, leave=False)
        with replacing(root / "cloaked") as folder, bar:
            for photo, name, one in zip(data.photos, names, finished, strict=True):
                file = Path(name).with_suffix(one.file.suffix)
                write_atomically(folder / file, one.file.data)
                source = {"source": photo.name, "sha256": photo.sha256}
                written = hashlib.sha256(one.file.data).hexdigest()
                result = {"cloaked": f"cloaked/{file}", "cloaked_sha256": written}
                entries.append({**source, **result, **described(one)})
                seen.append((one.seen_before, one.seen_after))
                allowed = max(allowed, one.bounds.largest if one.bounds else 0)
                bar.update(photo.size[0] * photo.size[1])
            befores, afters = (list(pictures) for pictures in zip(*seen, strict=True))
            picture = comparison(befores, afters, allowed)
            manifest = self._manifest(trainer, pl_module, entries, complete)
        write_json(root / MANIFEST, manifest)
        write_png(root / "comparison.png", picture)
        if removed := dict.fromkeys(what for entry in entries for what in entry.get("removed", [])):
            rank_zero_info(f"not in the cloaked files: {', '.join(removed)} ({MANIFEST} says it for each photo)")

    @staticmethod
    def _manifest(trainer: Trainer, pl_module: Any, entries: list[dict[str, Any]], complete: bool) -> dict[str, Any]:
        record, data = pl_module.record(), trainer.datamodule  # type: ignore[attr-defined]
        return {
            "settings": {
                **record["settings"],
                "max_epochs": trainer.max_epochs,
                "ranks": trainer.world_size,
                **{name: record[name] for name in ("clean_photos", "region") if name in record},
                "delivery": describe(data.delivery),
            },
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "seed": record["seed"],
            "rounds": rounds_of(trainer, pl_module),
            "passes": dict(zip(("denoiser", "encoder"), pl_module.passes.tolist(), strict=True)),
            "photos": entries,
            "complete": complete,
        }

    @staticmethod
    def _state(trainer: Trainer, pl_module: Any) -> Tensor:
        """What the photos are now, on the CPU."""
        state: Tensor = trainer.datamodule.canvas.blank + pl_module.perturbation.cpu()  # type: ignore[attr-defined]
        return state


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C interrupts; Lightning ignores it from the first one on, and large photos take minutes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def rounds_of(trainer: Trainer, pl_module: Any) -> int:
    """How many rounds the photos have been through."""
    return max(trainer.current_epoch, pl_module.rounds)


def described(one: Finished) -> dict[str, Any]:
    """A cloaked photo's line in the manifest: its size, how much it has changed, and what is not in its file any more.

    Where each pixel has a budget of its own, ``budgets`` says the largest one and their mean, in 8-bit steps.
    The largest difference is of the file's own numbers, read back; the rest is of what trainers read of it.
    """
    before, after = (torch.from_numpy(picture).permute(2, 0, 1) for picture in (one.before, one.after))
    size = {"size": [one.after.shape[1], one.after.shape[0]]}
    figures = {**cloak_quality(before, after), "largest_difference": one.file.largest}
    over = {"over_budget": round(one.file.over, 5)} if one.file.over else {}
    bounds = {"budgets": one.bounds._asdict()} if one.bounds else {}
    return {**size, **figures, **bounds, **over, **({"removed": list(one.file.removed)} if one.file.removed else {})}
