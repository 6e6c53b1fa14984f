"""Whether low precision pays on this machine."""

import torch


def computes_in_bf16() -> bool:
    """Whether the processor (a GPU where there is one) computes in bfloat16; emulated, it is slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
