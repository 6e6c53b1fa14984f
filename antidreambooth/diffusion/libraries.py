"""diffusers and transformers while they read a model: what goes wrong is one line of ours, and they stay quiet."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from antidreambooth.diffusion.configs import config_file
from antidreambooth.diffusion.source import INDEX, Source, download_command, locate
from antidreambooth.errors import InputError, causes, first_line

LOADING: tuple[type[BaseException], ...] = (  # what diffusers and transformers raise for a model that they cannot load
    OSError,  # a file is missing, unreadable or no JSON; the network is dead; the cache cannot be written
    ValueError,  # a config of no network; a tokenizer that is no JSON
    SafetensorError,  # weights are cut or something else
    StrictDataclassError,  # values in a config of transformers
    *HfHubHTTPError.__bases__,  # whatever HTTP client the hub's library uses: a download that breaks off
)
LOGGING = (diffusers_logging, transformers_logging)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# diffusers' words for weights of another shape than the config's; transformers lists them in its report.
OTHER_SHAPE = re.compile(r"(\S+) expected shape torch\.Size\((\[.*?\])\), but got torch\.Size\((\[.*?\])\)")


@contextmanager
def named_errors(source: Source, part: str) -> Iterator[None]:
    """Turns what is known to go wrong while a component is loaded into one message with the fix."""
    try:
        yield
    except LOADING as error:
        raise InputError(_advice(source, part, error)) from error


def _advice(source: Source, part: str, error: BaseException) -> str:
    """What cannot be loaded, why, and what can be done about it."""
    reason = first_line(error)
    refusals = [e.strerror for e in causes(error) if isinstance(e, OSError) and e.errno in UNWRITABLE]
    if isinstance(locate(source), Path):
        config = config_file(part)
        weights = " and safetensors weights" if config == "config.json" else ""
        holder = "components" if source.file else "it"
        fix = f"{holder} must hold {part if part == INDEX else f'{part}/ with {config}{weights}'}"
        if source.file and part == source.file.name:
            fix = "the file is damaged: download it again"
        if shape := OTHER_SHAPE.search(reason):
            reason = f"{shape[1]} has the shape {shape[3]}, not {shape[2]} as its config.json says"
    elif refusals:
        fix = "make room there and make it writable, or put it elsewhere with HF_HOME"
        reason = f"the hub's cache cannot be written: {refusals[0]}"
    elif re.search(r"does not appear to have a file named .*safetensors", reason) and not source.variant:
        fix = "where the hub has weights of a variant only, such as fp16, give --model.variant"
    else:
        fix = (
            f"check the name, the network and (for a gated model) `hf auth login`; or run "
            f"`{download_command(source)}` where there is a network, copy FOLDER here and pass --model.backbone FOLDER"
        )
    return f"the backbone {source} cannot be loaded: {part}: {reason.rstrip('.')}; {fix}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of a library while weights are read or written: what is wrong, we say ourselves."""
    shown, levels = transformers_logging.is_progress_bar_enabled(), [log.get_verbosity() for log in LOGGING]
    transformers_logging.disable_progress_bar()
    for log in LOGGING:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(LOGGING, levels, strict=True):
            log.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
