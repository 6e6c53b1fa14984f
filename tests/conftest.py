"""A random Stable Diffusion, so small that a round takes milliseconds, and a few synthetic photos."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import EMBEDDED, load_backbone

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache_and_offline(monkeypatch, tmp_path_factory):
    """No test reads or fills the user's cache, and none asks the hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
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
def backbone(small_model) -> Backbone:
    """Fresh weights for every test, since tests train them."""
    return load_backbone(str(small_model))


@pytest.fixture(params=["epsilon", "v_prediction"])
def any_backbone(request, small_model, small_v_model) -> Backbone:
    return load_backbone(str(small_model if request.param == "epsilon" else small_v_model))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three photos of nobody."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / name)
    return folder


def contents(folder: Path) -> dict[str, object]:
    """A folder's files by name: bytes, but what a safetensors file holds, whose header has no order of its own."""

    def content(path: Path) -> object:
        if path.suffix != ".safetensors":
            return path.read_bytes()
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            return file.metadata(), {k: (t.shape, t.dtype, t.numpy().tobytes()) for k, t in tensors.items()}

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def random_images(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """8-bit pictures, count 3 side side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
