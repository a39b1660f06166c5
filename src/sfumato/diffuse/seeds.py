"""Seeds of 64 bits, and the generators that they begin.

torch's CPU generator is a Mersenne Twister (MT19937), which `manual_seed` begins with the low 32
bits of a seed alone: seeds that differ by 2^32 would draw the same image. Larger seeds begin it
with the reference's initialisation by an array (Matsumoto & Nishimura 2002, mt19937ar.c,
init_by_array) of their low and their high word. Seeds below 2^32 draw what `manual_seed` draws.
"""

import secrets

import numpy as np
import torch
from torch import Tensor

_WORD = 2**32
_STATE = slice(24, 24 + 8 * 624)
"""Bytes of the twister's 624 words, 64 bits each, in the state of a generator of torch."""


def random_seed() -> int:
    """Draw a seed from the system's entropy, from 0 to 2^32 - 1, which every program accepts."""
    return secrets.randbelow(_WORD)


def seeded_generator(seed: int) -> torch.Generator:
    """Make a CPU generator that depends on all 64 bits of a seed.

    Args:
        seed: From 0 to 2^64 - 1; below 2^32 the generator is that of `manual_seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    return generator if seed < _WORD else generator.set_state(_state(seed))


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, as `torch.manual_seed`, with all 64 bits on the CPU too."""
    torch.manual_seed(seed)
    if seed >= _WORD:
        torch.default_generator.set_state(_state(seed))


def _state(seed: int) -> Tensor:
    """The state of a generator of torch that begins with both words of a seed."""
    state = torch.Generator().manual_seed(seed).get_state()
    high, low = divmod(seed, _WORD)
    words = np.random.RandomState(np.array([low, high], np.uint32)).get_state(legacy=False)
    key = torch.from_numpy(words["state"]["key"].astype(np.int64))
    state[_STATE] = key.view(torch.uint8)
    return state
