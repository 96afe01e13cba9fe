"""Country and US state names in real sentences as tagged tokens: ``python -m tools.experiments.silver_tags QNLI_DEV_TSV
OUT``.

Writes ``train.jsonl`` and ``dev.jsonl`` for token classification. The tags are *silver*: names out of the package
pycountry (ISO 3166), found by string match, longest first. Nobody read the sentences, so a Jordan may be a player and a
Georgia a state; what a model learns from them is the list of names in context. All sentences with a name stay, and
twice as many without. The data of docs/tasks.md were made with pycountry 26.2.16.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

TOKEN = re.compile(r"\w+(?:[-'.]\w+)*|[^\w\s]")
Names = dict[tuple[str, ...], str]


def names() -> Names:
    """Kind of every name, by its tokens: what stands before a comma, so that "Iran, Islamic Republic of" is Iran."""
    import pycountry

    kinds: dict[str, str] = {}
    for country in pycountry.countries:
        for field in ("name", "common_name", "official_name"):
            kinds[getattr(country, field, country.name).split(",")[0]] = "COUNTRY"
    for division in pycountry.subdivisions.get(country_code="US"):
        if division.type == "State":
            kinds.setdefault(division.name, "STATE")
    return {tuple(TOKEN.findall(name)): kind for name, kind in kinds.items()}


def tagged(text: str, known: Names) -> dict[str, list[str]]:
    """Tokens of a sentence with their IOB2 tags."""
    tokens, longest = TOKEN.findall(text), max(map(len, known))
    tags, at = ["O"] * len(tokens), 0
    while at < len(tokens):
        sizes = range(min(longest, len(tokens) - at), 0, -1)
        size = next((size for size in sizes if tuple(tokens[at : at + size]) in known), 0)
        if size:
            kind = known[tuple(tokens[at : at + size])]
            tags[at : at + size] = [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
        at += max(size, 1)
    return {"tokens": tokens, "tags": tags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="QNLI's dev.tsv: two sentences and a label a line")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = [line.rstrip("\n").split("\t") for line in options.source.open(encoding="utf-8")][1:]
    known = names()
    texts = sorted({text for row in rows for text in row[:2]})
    sentences = [row for text in texts if 3 <= len((row := tagged(text, known))["tokens"]) <= 80]
    rng = random.Random(0)
    named, others = ([row for row in sentences if (set(row["tags"]) != {"O"}) == has] for has in (True, False))
    rng.shuffle(named)
    rng.shuffle(others)
    chosen = named + others[: 2 * len(named)]
    rng.shuffle(chosen)
    held_out = len(chosen) // 4
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("dev", chosen[:held_out]), ("train", chosen[held_out:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        entities = sum(tag.startswith("B-") for row in part for tag in row["tags"])
        print(f"{name}: {len(part)} sentences, {entities} names")


if __name__ == "__main__":
    main()
