"""Diffusion, without any network.

Read `schedules` first, then `samplers`:

    schedules   alpha(t), sigma(t); eps, v, x_0, a flow's velocity and EDM's output turned into one another
    samplers    noise -> picture, given any denoise(x_t, t) -> x_0
    guidance    steering a denoiser: towards its conditions, away from others, between two noises
"""
