"""The tables of docs/will-it-pay.md are those that its command makes."""

import re

from engines.sparsity.gain_report import gain_report
from tools.gain_table import PAGE, SECTION, section, workload_of
from tools.rendering import read_section


def test_the_tables_on_the_page_are_those_of_the_command() -> None:
    made = section()
    assert read_section(PAGE, SECTION) == made, "python -m tools.gain_table --write"
    assert made.count("\n| BERT-") + made.count("\n| MiniLM") == 9


def test_the_verdict_on_the_page_is_that_of_bert_base() -> None:
    shown = re.search(r"^    verdict: (.*\n(?: {4}.*\n)*)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown is not None
    assert " ".join(shown[1].split()) == gain_report("", workload_of("BERT-base", 32, 128), "L4", "trt").verdict
