"""How networks are run: what costs or saves time and memory, and changes no result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """How the networks of a cloaking run are run.

    Args:
        decoder_rests: whether the decoder, which no round needs, is in main memory until a picture is drawn.
        recorded: whether a GPU replays the kernels of a PGD step and of a training step, recorded once as CUDA graphs,
            rather than be told each of them by Python: less time, more memory; for one process.
    """

    decoder_rests: bool = False
    recorded: bool = False
