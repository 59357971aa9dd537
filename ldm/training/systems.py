"""The four course systems that this project descends from, as presets: what each trained, on what, for how long.

What makes a system is kept: sizes of latents and networks, codes, losses, schedule, what is predicted, learning rates,
batches, epochs, no augmentation. It runs on this project's networks and steps, so what was wrong there is mended:
no test person trains anything; the discriminator's terms are balanced; latents have unit variance; no code dies; x_0 is
thresholded when sampling; the average of the weights is what draws; the learning rate warms up and decays.
`benchmarks/systems.py` trains each for equal minutes, docs/course-systems.md shows what came out.
"""

# The process of all of them but one: 1,000 steps with beta from 1e-4 to 0.02, and a network that says the noise.
_DDPM = {"schedule": "linear", "prediction": "eps", "blocks": 1, "attention": []}

# OASIS in latents of a sixteenth: L1, a PatchGAN that sees random pictures besides, a very small U-Net.
_OASIS_LATENT = {
    "image_size": 256,
    "autoencoder": {
        "downsampling": 16,
        "augment": 0.0,
        "gan": True,
        "random_latents": True,
        "batch_size": 4,
        "epochs": 50,
        "learning_rate": 2e-4,
    },
    "latents": {"views": 1},
    "diffusion": {
        **_DDPM,
        "loss": "l1",
        "width": 32,
        "multipliers": [1, 2],
        "epochs": 400,
        "learning_rate": 1e-3,
    },
}


def _in_pixels(image_size, epochs, batch_size):
    """OASIS in pixels: an attention U-Net of 30 million parameters, mean squared error."""
    return {
        "image_size": image_size,
        "first_stage": "none",
        "diffusion": {
            **_DDPM,
            "multipliers": [1, 2, 4, 6],
            "gates": True,
            "batch_size": batch_size,
            "epochs": epochs,
            "learning_rate": 1e-4,
        },
    }


SYSTEMS = {
    "course-oasis-vae": {
        **_OASIS_LATENT,
        "first_stage": "vae",
        "autoencoder": {**_OASIS_LATENT["autoencoder"], "latent_channels": 16},
    },
    "course-oasis-vqvae": {
        **_OASIS_LATENT,
        "autoencoder": {**_OASIS_LATENT["autoencoder"], "latent_channels": 8, "num_codes": 256},
    },
    # latents 32x32x4 without a discriminator, a U-Net of 45 million parameters, Huber's loss. Its first stage's
    # learning rate was 1e-5, with which nothing is learned within an hour.
    "course-adni": {
        "image_size": 256,
        "autoencoder": {
            "downsampling": 8,
            "latent_channels": 4,
            "num_codes": 8192,
            "augment": 0.0,
            "batch_size": 4,
            "epochs": 20,
            "learning_rate": 1e-4,
        },
        "latents": {"views": 1},
        "diffusion": {
            **_DDPM,
            "loss": "huber",
            "multipliers": [1, 2, 4, 8],
            "batch_size": 4,
            "epochs": 23,
            "learning_rate": 1e-4,
        },
    },
    "course-pixels-64": _in_pixels(64, epochs=50, batch_size=64),
    "course-pixels-128": _in_pixels(128, epochs=100, batch_size=16),
    "course-pixels-256": _in_pixels(256, epochs=200, batch_size=4),
    # 128 pixels again, six levels. Its own schedule, quadratic betas in 500 steps, ended at alpha(1) = 0.17, so that
    # sampling began from noise that training had never shown; this one is quadratic, too.
    "course-pixels-best": {
        "image_size": 128,
        "first_stage": "none",
        "diffusion": {
            **_DDPM,
            "schedule": "scaled_linear",
            "loss": "l1",
            "width": 32,
            "multipliers": [1, 2, 4, 8, 16, 32],
            "batch_size": 32,
            "epochs": 800,
            "learning_rate": 1e-3,
        },
    },
}
