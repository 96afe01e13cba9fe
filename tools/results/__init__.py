"""The measuring tool behind ``docs/results.md``: ``python -m tools.results run`` and ``python -m tools.results render``.

::

    tasks -> run (rows: what there is to measure) -> results/<task>/*.json -> statistics -> table, plots

One JSON file per (task, row, seed) is kept in the repository, with the predictions of every dev sentence, so that tables
and paired intervals are made again without training, and `run` trains only what is missing.
"""
