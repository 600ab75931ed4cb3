"""WikiText's tokenised flavour -> plain text: wikitext.py valid.tokens.txt wiki.txt

Article titles (" = Title = ") stay on lines of their own, because documents are cut there.
"""

import re
import sys
from pathlib import Path

RULES = (
    (r" @([-,.])@ ", r"\1"),  # 2 @.@ 7 -> 2.7
    (r" ([.,;:!?)\]}%]|'s\b|'t\b|'re\b|'ve\b|'ll\b|'d\b|'m\b|n't\b)", r"\1"),
    (r"([(\[{$£€]) ", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r"(\w) '(?=[ ,.;)])", r"\1'"),
    (r" +\n", "\n"),
)


def plain(text: str) -> str:
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(plain(source.read_text(encoding="utf-8")), encoding="utf-8")
