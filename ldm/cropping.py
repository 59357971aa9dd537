"""The part of the pictures that the networks see: a box around the brain. Outside it everything is black."""

from typing import NamedTuple

import numpy as np

from ldm.later import ops


class CropBox(NamedTuple):
    """A rectangle of pixels, the same for all pictures; as a list, [top, left, height, width], it is in the settings.

    Pictures are (B, H, W, ...) arrays or tensors: images, or masks without a last axis.
    """

    top: int
    left: int
    height: int
    width: int

    @staticmethod
    def room(size):
        """Pixels that are left free on each side of the brain, in pictures of so many pixels a side."""
        return size // 40

    @classmethod
    def around(cls, filled, step):
        """The least box with room around all that is filled, for augmentation moves and scales the brain.

        Args:
            filled: (size, size) bool, the pixels that are not black in every picture.
            step: the box's sides are multiples of this, as far as the picture goes.

        Returns:
            The box; the whole picture where nothing is filled.
        """
        size, sides = len(filled), []
        for axis in (1, 0):
            places = np.flatnonzero(filled.any(axis=axis))
            first, last = (places[0], places[-1] + 1) if len(places) else (0, size)
            length = min(-(-(last - first + 2 * cls.room(size)) // step) * step, size)
            sides.append((int(np.clip((first + last - length) // 2, 0, size - length)), int(length)))
        (top, height), (left, width) = sides
        return cls(top, left, height, width)

    @property
    def shape(self):
        """(height, width)."""
        return (self.height, self.width)

    def crop(self, images):
        """Whole pictures -> what lies in the box, (B, height, width, ...)."""
        images = ops.convert_to_tensor(images)
        return images[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def pad(self, images, value, size, rim=0):
        """Put pictures back where `crop` took them from, in pictures of `size` pixels a side, `value` around them.

        Args:
            rim: pixels inside the box's edges that get the value as well, but not where an edge is the picture's own.
        """
        margins = [(self.top, size - self.top - self.height), (self.left, size - self.left - self.width)]
        (above, below), (before, after) = [[rim if margin else 0 for margin in pair] for pair in margins]
        inside = images[:, above : self.height - below, before : self.width - after]
        margins = [(margins[0][0] + above, margins[0][1] + below), (margins[1][0] + before, margins[1][1] + after)]
        return ops.pad(inside, [(0, 0), *margins, *[(0, 0)] * (len(images.shape) - 3)], constant_values=value)
