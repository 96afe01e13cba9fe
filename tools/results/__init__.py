"""The measuring tool behind ``docs/results.md``: ``python -m tools.results run`` and ``python -m tools.results
render``.

::

    tasks -> run (rows: what there is to measure) -> results/<task>.jsonl -> statistics -> page, plots

One line per (row, seed) is kept in the repository, with the predictions of every dev sentence, so that tables and
paired intervals are made again without training, and `run` trains only what is missing.
"""
