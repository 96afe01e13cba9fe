"""The names of rows, and the settings that they change."""

from __future__ import annotations

from compressors.settings import Losses, Settings
from tools.results.rows import STANDARD, row_named, rows_named
from tools.results.run import changed


def test_all_is_every_standard_row_once() -> None:
    assert [row.name for row in rows_named("all,dense")] == list(STANDARD)
    assert row_named("searched-hw-87.5").search == ("nxm", "hw", 0.875)
    assert row_named("paper-search-hw-87.5").search == ("paper", "hw", 0.875)
    ablation = row_named("one-shot-1:4+W4-permuted-activation")
    assert ablation.settings == {"recipe": "one-shot", "permute": True, "mask_scores": "activation"}
    assert row_named("nxm-2:4+W8-attention-table").plan == {"placement": "attention", "embedding": "int8"}
    thorough = row_named("searched-hw-87.5-thorough")
    assert (thorough.search, thorough.settings) == (("nxm", "hw", 0.875), {"recipe": "obs"})
    assert thorough.searching == {"samples": 256, "held_out": 256}
    longer = row_named("nxm-2:4+W4-18-epochs-joint-ste")
    assert (longer.option, longer.settings) == ("2:4+W4", {"recipe": "nxm", "epochs": 18.0, "admm": "joint-ste"})
    for name, losses in (
        ("nxm-2:4+W4-logits", Losses(0.0, 1.0, 0.0)),
        ("nxm-2:4+W4-unaugmented-logits", Losses(0.5, 1.0, 0.0)),
        ("nxm-2:4+W4-labelled", Losses(0.5, 1.0, 1.0)),
        ("nxm-2:4+W4-alone", Losses()),
    ):
        assert changed(Settings(), row_named(name), 384).losses == losses, name
    more = row_named("admm-2:4+W4-much-more-text")
    assert (more.more_text, more.settings, row_named("admm-2:4+W4-more-text").more_text) == (
        0.8,
        {"recipe": "admm"},
        0.5,
    )
    assert changed(Settings(augment=0.0), more, 384).losses == Losses(0.0, 1.0, 10.0)
    assert row_named("searched-hw-90").recipe == "obs"
    untrained = row_named("obs-refit-2:4+W4-untrained")
    assert (untrained.settings, untrained.option) == ({"recipe": "obs-refit", "steps": 0}, "2:4+W4")
    assert untrained.baseline == "magnitude-2:4+W4-untrained"
    assert not changed(Settings(epochs=6.0), untrained, 384).trains
    # So what was measured of trained rows is still of today's settings, and what was of untrained ones is named.
    assert changed(Settings(), untrained, 384).percentile is None
    assert changed(Settings(), row_named("obs-refit-2:4+W4"), 384).percentile == 99.99
    assert changed(Settings(), row_named("obs-refit-2:4+W4"), 384).average == 0.0
    averaged = row_named("admm-2:4+W4-averaged")
    assert changed(Settings(), averaged, 384).average == Settings().average, "the rows that have the default"
    assert averaged.baseline == "magnitude-2:4+W4-averaged"
    assert row_named("searched-hw-90-admm-unaugmented").settings == {"recipe": "nxm", "augment": 0.0}
    default = row_named("searched-hw-87.5-by-admm-averaged")
    assert (default.recipe, default.search, default.is_plain) == ("admm", ("nxm", "hw", 0.875), True)
    assert default.settings == {"recipe": "admm", "average": 0.1}
    former = row_named("searched-hw-90-unaugmented")
    assert (former.search, former.baseline) == (("nxm", "hw", 0.9), "magnitude-2:4+W4-unaugmented")
    assert (ablation.option, ablation.baseline) == ("1:4+W4", "magnitude-1:4+W4")
    assert (row_named("paper-2:4+W4").recipe, row_named("sr-ste-1:4+W4").option) == ("paper", "1:4+W4")


def test_a_row_that_is_not_trained_has_ranges_of_its_own() -> None:
    assert "percentile" in row_named("admm-2:4+W4-untrained").moved
    assert "percentile" not in row_named("admm-2:4+W4-averaged").moved
