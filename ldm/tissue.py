"""The tissue classes of a mask, said once: a class is a place in NAMES and in LEVELS. -1 stands for an unknown
class.
"""

BACKGROUND, CSF, GREY, WHITE = CLASSES = range(4)
NAMES = ("background", "CSF", "grey matter", "white matter")
LEVELS = (0, 85, 170, 255)  # grey levels of the classes in a mask's PNG, as in the OASIS course archive
