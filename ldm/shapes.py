"""What must stand in a JSON file, and what in one that was read does not: of reports, and of what a run writes down.

A shape is one of: NUMBER, int, str, bool, or object for anything; [shape] for a list; (shape, shape) for a list of two;
{name: shape} for names that are fixed, of which one that ends in "?" may be missing; {str: shape} for any names, and
beside fixed ones for all others.
"""

from numbers import Real

NUMBER = float  # None and NaN, which were not measured, are numbers too


def problems(facts, shape, where):
    """What in the content of a JSON file has not the shape it should have.

    Args:
        facts: as they come out of the file.
        shape: see above.
        where: what the facts are called.

    Returns:
        Sentences; none where all is well.
    """
    if shape is NUMBER:
        fits = facts is None or isinstance(facts, Real) and not isinstance(facts, bool)
        return [] if fits else [f"{where} is no number"]
    if isinstance(shape, type):
        fits = isinstance(facts, shape) and (shape is not int or not isinstance(facts, bool))
        return [] if fits else [f"{where} is no {shape.__name__}"]
    if isinstance(shape, list | tuple):
        if not isinstance(facts, list | tuple):
            return [f"{where} is no list"]
        if isinstance(shape, tuple) and len(facts) != len(shape):
            return [f"{where} has {len(facts)} values, not {len(shape)}"]
        each = shape if isinstance(shape, tuple) else shape * len(facts)
        return [
            said for i, (a, b) in enumerate(zip(facts, each, strict=True)) for said in problems(a, b, f"{where}[{i}]")
        ]
    if not isinstance(facts, dict):
        return [f"{where} is no mapping"]
    fixed = {name: part for name, part in shape.items() if name is not str}
    known = {name.removesuffix("?"): part for name, part in fixed.items()}
    if str in shape:
        known |= {name: shape[str] for name in facts if name not in known}
    said = [f"{where} lacks {name}" for name in fixed if name[-1] != "?" and name not in facts]
    said += [f"{where} has {name}, which nothing should have" for name in facts if name not in known]
    return said + [s for name in facts if name in known for s in problems(facts[name], known[name], f"{where}: {name}")]
