"""What guidance moves away from, one file each, found by name: the same network without the
condition, or a weaker network with it.

A reference is a frozen dataclass of settings with

    pair(denoiser, conditioning, reference, weaker) -> (denoiser, conditioning)      whom to ask,
                                                                                     and under which
                                                                                     condition
    condition  whether it takes the reference's conditioning: no condition, or a negative prompt

reference: that conditioning. weaker: somebody else's denoiser, which only "model" takes.
"""
