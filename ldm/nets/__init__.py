"""What networks are built of, in `keras.ops`.

From small to large:

    normalization   group normalisation with FiLM and SiLU, in few passes over memory
    layers          residual blocks, attention, embeddings
    transformer     causal attention with a key-value cache, and how tokens are drawn
    networks        the first stage's: encoder, decoder, discriminator
    unet            the denoising network
    bottlenecks     what stands between encoder and decoder: codebook, grid, Gaussian
    saving          how a class gets into a file and out of it
"""
