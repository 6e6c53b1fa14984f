"""A random Stable Diffusion, so small that a round takes milliseconds, and a few synthetic photos."""

import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; processes that tests start inherit it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it no matrix product on a GPU is deterministic

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from antidreambooth.attack.methods import METHODS
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.source import EMBEDDED

# When there first is a default device, torch notes which functions heed it. Inside transformers' loading that would be
# a torch.linspace of theirs, and the true one would never heed any.
with torch.device("cpu"):
    torch.empty(0)

# The same command tests the same examples, however busy the machine; `--hypothesis-profile fresh` looks for new ones.
settings.register_profile("fresh", deadline=None)
settings.register_profile("alike", settings.get_profile("fresh"), derandomize=True)
settings.load_profile("alike")

ROOT = Path(__file__).parent.parent
SURROGATE = (  # a victim of a few steps, which FSMG attacks
    "configs/dreambooth.yaml --model.training.learning_rate 1e-3 --model.training.steps 2 "
    "--model.training.prior.images 4"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``thorough``, unless ``-m`` names it; files with most slow tests come first.

    What takes minutes must not begin last, when there is nothing left for the other worker to do.
    """
    if "thorough" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def beyond(host: Any) -> bool:
    """Whether an address or a name is of another machine than this one."""
    return host not in (None, "", "localhost", "::", "::1", "0.0.0.0") and not str(host).startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def network() -> Iterator[list[Any]]:
    """A dead network: whoever connects to another machine or looks up its name fails; gives what was tried."""
    tried: list[Any] = []

    def guarded(real: Callable[..., Any], host_of: Callable[..., Any], error: type[OSError]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args)
            if beyond(host):
                tried.append(host)
                raise error(errno.ENETUNREACH, "the tests have no network")
            return real(*args, **kwargs)

        return call

    def host_of_socket(own: socket.socket, address: Any, *flags: int) -> Any:
        return address[0] if own.family in (socket.AF_INET, socket.AF_INET6) else None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), host_of_socket, OSError))
        patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host, socket.gaierror))
        yield tried


@pytest.fixture(autouse=True)
def _nobody_was_asked(network):
    """No test asks the hub, nor sends anybody word of itself, not even where it lives on without an answer."""
    network.clear()
    yield
    assert network == []


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or fills the user's cache; of a session, so that fixtures of modules do not either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _no_seed_of_another_run(monkeypatch):
    """``seed_everything`` leaves it in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Means the same where the tests run in the background, whose processes a shell tells to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The small model gains nothing from more, and loses a lot where something else keeps a core busy."""
    torch.set_num_threads(1)


def small_unet(widths: tuple[int, int], cross_attention_dim: int) -> UNet2DConditionModel:
    """A random U-Net of two levels for 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=8,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def save_small_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A diffusers folder for 16-pixel images with 8 x 8 latents."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer")
    StableDiffusionPipeline(
        unet=small_unet((16, 32), cross_attention_dim=16),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_v_model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small-v") / "model", "v_prediction")


@pytest.fixture
def device(request) -> torch.device:
    """Where a test runs: one that is marked ``gpu`` on the GPU of a machine that has one, any other on the CPU."""
    wanted = request.node.get_closest_marker("gpu") and torch.cuda.is_available()
    return torch.device("cuda", 0) if wanted else torch.device("cpu")


@pytest.fixture
def backbone(small_model, device) -> Backbone:
    """Fresh weights for every test, since tests train them."""
    return load_backbone(str(small_model)).to(device)


@pytest.fixture(params=["epsilon", "v_prediction"])
def any_backbone(request, small_model, small_v_model, device) -> Backbone:
    return load_backbone(str(small_model if request.param == "epsilon" else small_v_model)).to(device)


def three_photos(folder: Path) -> Path:
    """A new folder of three photos of nobody."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return three_photos(tmp_path / "photos")


@pytest.fixture
def command(small_model, small_v_model, photos, tmp_path):
    """Builds the arguments of a cloaking run of a few small rounds; more can be added."""

    def build(*more: str, config: str | Path = "aspl", rounds: int = 2, out: str = "out") -> list[str]:
        path = ROOT / "configs" / f"{config}.yaml" if isinstance(config, str) else config
        kinds: dict[str, list[str]] = {"trained": [f"--model.surrogate={SURROGATE}"], "untouched": [], "none": []}
        learning = ["--model.surrogate.learning_rate=1e-3", "--model.surrogate.prior.images=4"]
        kinds["pool"] = [*learning, "--model.surrogate.steps=5"]
        fixed = {name: kinds[method.surrogate] for name, method in METHODS.items() if method.surrogate in kinds}
        several = [f"--model.ensemble.backbones=[{small_v_model}]"] if path.stem.startswith("e-") else []
        return [
            "fit",
            f"--config={path}",
            f"--data.photos={photos}",
            f"--model.backbone={small_model}",
            *fixed.get(path.stem, learning),
            *several,
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            f"--trainer.max_epochs={rounds}",
            f"--trainer.default_root_dir={tmp_path / out}",
            "--checkpoint.every_n_epochs=1",
            *more,
        ]

    return build


@pytest.fixture
def noted(monkeypatch):
    """From here on notes the numbers of the rounds or steps that a class of modules runs in this process."""

    def note(kind: type) -> list[int]:
        numbers: list[int] = []
        step = kind.training_step  # type: ignore[attr-defined]

        def watched(self: Any, batch: Any, batch_idx: int) -> Any:
            numbers.append(self.current_epoch + batch_idx)  # a round is an epoch of one batch, a victim has one epoch
            return step(self, batch, batch_idx)

        monkeypatch.setattr(kind, "training_step", watched)
        return numbers

    return note


def contents(folder: Path) -> dict[str, object]:
    """A folder's files by name: bytes, but what a safetensors file holds, whose header has no order of its own."""

    def content(path: Path) -> object:
        if path.suffix != ".safetensors":
            return path.read_bytes()
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            return file.metadata(), {k: (t.shape, t.dtype, t.numpy().tobytes()) for k, t in tensors.items()}

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def hostile() -> Iterator[None]:
    """What is made without saying where is on the meta device, and what is made without saying how is float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_images(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """8-bit pictures, count 3 side side, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8, device="cpu")
