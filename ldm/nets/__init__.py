"""What networks are built of, in `keras.ops`.

From small to large:

    normalization   group normalisation with FiLM and SiLU, in few passes over memory
    layers          residual blocks, attention, embeddings
    transformer     causal attention with a key-value cache, and how tokens are drawn
    quantizers      codebooks
"""
