"""Run all blocks of teaching.md, one after the other, as one program."""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("teaching.md")


def blocks():
    """[(heading, code)] of the page."""
    found = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [(title, re.search(r"```python\n(.*?)```", text, re.S).group(1)) for title, text in found]


def main():
    names = {}
    for title, code in blocks():
        print(f"== {title}", flush=True)
        exec(compile(code, str(PAGE), "exec"), names)


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    main()
