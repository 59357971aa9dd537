"""What a training needs beside its networks.

In the order of a training:

    presets        what a run is, unless flags say otherwise
    rules          what settings a run can have, and which flags would have no effect
    losses         what training minimises and watches: comparisons of images, a GAN's terms, annealing
    distribution   what a train_step needs to be right on several replicas
    reports        which numbers an epoch reports
    corruption     what a diffusion model's training takes away from a batch: noise, hidden conditions
    adversary      a first stage against a discriminator: its training, when it starts, when it is turned down
    prior          a transformer over the codes of a VQ-VAE
    callbacks      the optimizer and the callbacks that a training is run with
    runs           the run folder: names, checkpoints, resume, records
    old_runs       run folders of earlier versions, read as today's
"""
