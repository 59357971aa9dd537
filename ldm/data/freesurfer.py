"""FreeSurfer's folders: `bert/mri/brain.mgz` is a volume of bert, and all others in `bert/mri/` were made on the way.

one_of_each     of each person's volumes the one to use
"""

import collections
import re

PREFERRED = tuple("brain brainmask norm T1 nu orig rawavg orig/001".split())  # without skull first, as archives have it
INSIDE = re.compile(r"((?:.*/)?([^/]+))/mri/(.+?)\.mg[zh]", re.DOTALL)
TEMPLATES = re.compile(r"fsaverage\d?(?:_sym)?|cvs_avg35.*|[lr]h\.EC_average")  # lie beside people, and are nobody


def one_of_each(volumes: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Of each person's volumes the one to use: the first of PREFERRED that is there.

    Args:
        volumes: names of files, with `/` between folders.

    Returns:
        {volume: what it is read as, the folder of its person}, of those to use; the person's other volumes; and those
        of templates. Volumes outside of such folders are in none of them.
    """
    inside = {name: found.groups() for name in volumes if (found := INSIDE.fullmatch(name))}
    places = collections.defaultdict(dict)
    for name, (place, person, volume) in inside.items():
        if not TEMPLATES.fullmatch(person):
            places[place][volume] = name
    chosen = {place: next((there[v] for v in PREFERRED if v in there), None) for place, there in places.items()}
    used = {name: place for place, name in chosen.items() if name}
    others = [name for name, (place, _, _) in inside.items() if chosen.get(place) and name not in used]
    return used, others, [name for name, (_, person, _) in inside.items() if TEMPLATES.fullmatch(person)]
