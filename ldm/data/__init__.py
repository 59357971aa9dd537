"""Slices out of archives.

From bytes to what a network sees:

    archive      the bytes of a slice in a zip, a folder or a NIfTI volume; which name is whose slice
    table        what labels.csv says of people, and how networks are told
    transforms   a slice fitted to a square; augmentation
    phantom      brains with known anatomy, drawn from formulas
"""
