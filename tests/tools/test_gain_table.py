"""The tables of docs/will-it-pay.md are those that its command makes."""

from engines.sparsity.gain_report import gain_report
from tools.gain_table import ANSWER, PAGE, SECTION, answer, section, workload_of
from tools.rendering import read_section


def test_the_tables_on_the_page_are_those_of_the_command() -> None:
    made = section()
    assert read_section(PAGE, SECTION) == made, "python -m tools.gain_table --write"
    assert made.count("\n| BERT-") + made.count("\n| MiniLM") == 9


def test_the_answer_on_the_page_is_that_of_the_command() -> None:
    made = answer()
    assert read_section(PAGE, ANSWER) == made, "python -m tools.gain_table --write"
    assert gain_report("", workload_of("BERT-base", 32, 128), "L4", "trt").verdict in " ".join(made.split())
