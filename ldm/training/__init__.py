"""What a training needs beside its networks.

In the order of a training:

    settings       every setting of a run, declared once: flags, defaults, bounds, what may change, models' arguments
    presets        settings to start from
    systems        presets again: the course systems that this project descends from
    records        what a stage writes down of itself, and what may be made of a run that has such records
    inheritance    what a run takes over from the one whose encoder it keeps
    losses         what training minimises and watches: comparisons of images, a GAN's terms, annealing
    distribution   what a train_step needs to be right on several replicas
    reports        which numbers an epoch reports
    corruption     what a diffusion model's training takes away from a batch: noise, hidden conditions
    adversary      a first stage against a discriminator: its training, when it starts, when it is turned down
    prior          a transformer over the codes of a VQ-VAE
    progress       what a training says while it runs
    optimizers     AdamW as one fused operation per variable
    planning       how many epochs and steps fit into `--minutes`
    callbacks      the optimizer and the callbacks that a training is run with
    runs           the run folder: names, checkpoints, resume, records
    old_runs       run folders of earlier versions, read as today's
"""
