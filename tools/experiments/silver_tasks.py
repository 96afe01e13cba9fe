"""Data for the tasks that there is no annotated corpus of: ``python -m tools.experiments.silver_tasks QNLI_DEV_TSV
OUT``.

Writes a folder for each task, with ``train`` and ``dev`` (a quarter; no question is in both, but a sentence may be,
beside another question):

* ``token-classification``: the names of `tools.experiments.silver_tags`;
* ``multi-label``: which kinds of names a sentence has;
* ``question-answering``: which country or state a sentence names, the first of them being the answer;
* ``reranking``: a question of QNLI, the sentence that answers it, and three of other questions;
* ``regression``: which share of a question's words stands in the sentence beside it.

Nobody read them. They tell how near a compressed model stays to the dense one on each task, not how well either does.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tools.experiments.silver_tags import names, tagged

WORD = re.compile(r"\w+")
OTHERS = 3  # candidates of a query that do not answer it
Row = Mapping[str, object]


def labelled(rows: Iterable[Mapping[str, list[str]]]) -> Iterable[Row]:
    """Sentences with the kinds of names that they have."""
    for row in rows:
        kinds = sorted({tag[2:] for tag in row["tags"] if tag != "O"})
        yield {"text": " ".join(row["tokens"]), "labels": kinds}


def asked(rows: Iterable[Mapping[str, list[str]]]) -> Iterable[Row]:
    """A question for the first name of every kind in a sentence."""
    for row in rows:
        starts, at = [], 0
        for token in row["tokens"]:
            starts.append(at)
            at += len(token) + 1
        context = " ".join(row["tokens"])
        for kind in ("COUNTRY", "STATE"):
            if f"B-{kind}" in row["tags"]:
                first = last = row["tags"].index(f"B-{kind}")
                while row["tags"][last + 1 : last + 2] == [f"I-{kind}"]:
                    last += 1
                answer = context[starts[first] : starts[last] + len(row["tokens"][last])]
                question = f"Which {kind.lower()} is named?"
                yield {
                    "question": question,
                    "context": context,
                    "answers": {"text": [answer], "answer_start": [starts[first]]},
                }


def candidates(pairs: Sequence[tuple[str, str, str]], rng: random.Random) -> Iterable[Row]:
    """Every question that its sentence answers, with that sentence and some of others."""
    sentences = [sentence for _, sentence, _ in pairs]
    for question, sentence, label in pairs:
        if label == "0":  # entailment
            yield {"query": question, "document": sentence, "relevance": 1}
            for other in rng.sample(sentences, OTHERS):
                if other != sentence:
                    yield {"query": question, "document": other, "relevance": 0}


def overlaps(pairs: Iterable[tuple[str, str, str]]) -> Iterable[Row]:
    """Pairs with the share of the first text's words that the second has."""
    for question, sentence, _ in pairs:
        ours, theirs = (set(WORD.findall(text.lower())) for text in (question, sentence))
        if ours:
            yield {"text": question, "text_pair": sentence, "score": round(len(ours & theirs) / len(ours), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="QNLI's dev.tsv: two sentences and a label a line")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    lines = [line.rstrip("\n").split("\t") for line in options.source.open(encoding="utf-8")][1:]
    rng = random.Random(0)
    by_question = {line[0]: (line[0], line[1], line[2]) for line in lines}
    pairs = [by_question[question] for question in sorted(by_question)]
    rng.shuffle(pairs)
    known = names()
    for part, some in (("dev", pairs[: len(pairs) // 4]), ("train", pairs[len(pairs) // 4 :])):
        sentences = [row for _, text, _ in some if 3 <= len((row := tagged(text, known))["tokens"]) <= 80]
        named = [row for row in sentences if set(row["tags"]) != {"O"}]
        plain = [row for row in sentences if set(row["tags"]) == {"O"}][: 2 * len(named)]
        both = rng.sample([*named, *plain], len(named) + len(plain))
        _write(options.out / "token-classification" / f"{part}.jsonl", both)
        _write(options.out / "multi-label" / f"{part}.jsonl", labelled(both))
        _write(options.out / "question-answering" / f"{part}.jsonl", asked(named))
        _write(options.out / "reranking" / f"{part}.jsonl", candidates(some, rng))
        _write(options.out / "regression" / f"{part}.jsonl", overlaps(some))


def _write(file: Path, rows: Iterable[Row]) -> None:
    written = [json.dumps(row) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    print(f"{file.parent.name}, {file.stem}: {len(written)} rows")


if __name__ == "__main__":
    main()
