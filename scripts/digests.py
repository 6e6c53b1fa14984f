"""SHA-256 of what a short run of every shipped config writes: run it before and after a change that must not show.

``python scripts/digests.py OUT`` in the root of a checkout runs every config for a few steps on the embedded model and
the example photos, with fixed seeds, on one thread of the CPU, in fp32, and writes ``OUT/digests.tsv``: a line for each
cloaked photo, trained model and table, with the hash of its content. Two such files of one machine can be compared
with ``diff``. It takes about five minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

ROOT = Path.cwd()
COMMON = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
SHORT = ["--trainer.max_epochs=2", "--model.pgd_steps=2"]
LEARNING = [*SHORT, "--model.surrogate.steps=2"]
PRIOR = ["--model.surrogate.prior.weight=1", "--model.surrogate.prior.images=4"]
TRAINED = "configs/dreambooth.yaml --model.training.steps 3 --trainer.precision 32-true"
FIXED = [*SHORT, f"--model.surrogate={TRAINED}"]
VICTIM = ["--model.training.steps=4", "--model.training.prior.images=4"]


def runs(out: Path) -> dict[str, list[str]]:
    """Name of each run's folder, and its command line."""
    sibling = f"--model.ensemble.backbones=[{out / 'pretraining' / 'model'}]"
    captioned = [f"--data.folder={out / 'captioned'}", "--model.steps=3", "--model.batch_size=2"]
    fits = {
        "aspl": ["aspl", *LEARNING, *PRIOR],
        "aspl-bf16": ["aspl", *LEARNING, "--trainer.precision=bf16-mixed"],
        "aspl-lora": ["aspl", *LEARNING, "--model.adaptation=LoRA"],
        "t-aspl": ["t-aspl", *LEARNING],
        "advdm": ["advdm", *SHORT],
        "fsmg": ["fsmg", *FIXED],
        "t-fsmg": ["t-fsmg", *FIXED],
        "dreambooth": ["dreambooth", *VICTIM, "--model.training.prior.weight=1"],
        "dreambooth-lora": ["dreambooth-lora", *VICTIM],
        "textual-inversion": ["textual-inversion", *VICTIM],
        "pretraining": ["pretraining", *captioned, "--model.widths=[32,32,32]"],
        "e-aspl": ["e-aspl", *LEARNING, sibling],
        "e-fsmg": ["e-fsmg", *FIXED, sibling],
    }
    commands = {
        name: ["fit", f"--config=configs/{config}.yaml", *COMMON, *flags, f"--trainer.default_root_dir={out / name}"]
        for name, (config, *flags) in fits.items()
    }
    for name in ("dreambooth", "dreambooth-lora", "textual-inversion"):
        asked = ["--data.reference_photos=examples/photos", "--model.generation.images=2", "--model.stability=true"]
        commands[f"{name}-test"] = ["test", *commands[name][1:], *asked]
    shorter = f"--protection=configs/aspl.yaml {' '.join([*COMMON, *LEARNING])}"
    commands["people"] = ["people", "--config=configs/people.yaml", f"--folder={out / 'persons'}", shorter]
    commands["people"] += [f"--output={out / 'people'}", "--launcher.workers=1"]
    commands["verdict"] = ["verdict", f"--config={out / 'verdict.yaml'}", f"--folder={out}"]
    return commands


def prepare(out: Path) -> None:
    """What the runs need beside the repository."""
    (out / "captioned").mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), np.uint8)
    np.save(out / "captioned" / "pictures.npy", pictures)
    (out / "captioned" / "captions.json").write_text(json.dumps(["a photo of a person"] * 8))
    (out / "persons").mkdir()
    (out / "persons" / "one").symlink_to(ROOT / "examples" / "photos")
    short = " ".join([*COMMON, "--model.training.steps 4"])
    jpeg = {"class_path": "JPEG", "init_args": {"quality": 75}}
    cleaned = {"class_path": "Clean", "init_args": {"steps": 5}}
    experiment = {
        "name": "verdict",
        "people": {"one": {"photos": "examples/photos", "clean_photos": "examples/photos"}},
        "protections": {
            "none": "none",
            "noise": "noise",
            "aspl": f"configs/aspl.yaml {' '.join([*COMMON, *LEARNING])}",
        },
        "victims": {"full": f"configs/dreambooth.yaml {short}"},
        "conditions": {"nothing": [], "jpeg-cleaned": [jpeg, cleaned]},
        "generation": {"prompts": ["a photo of sks person"], "images": 2},
        "launcher": {"workers": 1},
        "keep_models": True,
    }
    (out / "verdict.yaml").write_text(json.dumps(experiment))


def digest(path: Path) -> str:
    """Of a file's bytes; of a safetensors file's tensors, since its header has no order of its own."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            found.update(name.encode() + np.ascontiguousarray(file.get_tensor(name)).tobytes())
    return found.hexdigest()


def main(out: Path) -> None:
    """Runs everything and writes the table."""
    prepare(out)
    kept = ("cloaked/*.png", "comparison.png", "samples/*.png", "**/*.safetensors", "per_image.csv", "measures.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")}
    for name, words in runs(out).items():
        print(name, flush=True)
        with (out / f"{name}.log").open("w") as log:
            command = [sys.executable, "cli.py", *words]
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)  # noqa: S603
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}: see {out / name}.log")
    files = {path for pattern in kept for path in out.glob(f"**/{pattern}") if path.is_file()}
    files |= {out / "verdict" / "table.csv"}
    lines = [f"{file.relative_to(out)}\t{digest(file)}" for file in sorted(files)]
    (out / "digests.tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
