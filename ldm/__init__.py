"""The library under the command lines: one room, one thing.

    phantom       brains with known anatomy, drawn from formulas
    schedules     alpha(t), sigma(t); eps, v, x_0, a flow's velocity and EDM's output turned into one another
    samplers      noise -> picture, given any denoise(x_t, t) -> x_0
    guidance      steering a denoiser: towards its conditions, away from others, between two noises
    layers        the blocks that the networks are built of
    normalization group normalisation with FiLM and SiLU, in few passes over memory
    transformer   causal attention with a key-value cache, and how tokens are drawn
    quantizers    codebooks
    losses        what training minimises and watches: comparisons of images, a GAN's terms, annealing
    adversary     when adversarial training starts and is turned down; the bank of codes it draws from
    presets       what a run is, unless flags say otherwise
    rules         what settings a run can have, and which flags would have no effect
    distribution  what a train_step needs to be right on several replicas
    training      the optimizer and the callbacks that a training is run with
    runs          the run folder: names, checkpoints, resume, records
    metrics       how good are the pictures: functions on arrays
    fidelity      how far a set of pictures is from another: KID, Frechet, precision and recall
    audit         copies of training slices; slices in two splits
    anatomy       tissue, ventricles, symmetry: is it a brain
    figures       sheets, GIFs and tissue maps: pictures made of pictures
    charts        curves, scatter plots and histograms: pictures with axes
    report        report.html and the model card
    transforms    a slice fitted to a square; augmentation
    table         what labels.csv says of people, and how networks are told
    archive       the bytes of a slice in a zip, a folder or a NIfTI volume; which name is whose slice

Rooms import nothing of ours, except that samplers import schedules, layers import normalization, rules import presets
and runs, training imports charts, fidelity and runs, and charts import figures (these two alone import matplotlib).
Networks and samplers are written with `keras.ops`; `distribution`, `adversary` and `runs` are TensorFlow's, and so is
the fast half of `normalization`.
"""
