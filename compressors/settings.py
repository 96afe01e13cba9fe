"""How a model is fine-tuned and compressed: recipe, phases, steps, learning rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressors import distributed
from compressors.malloc import keep_freed_memory
from compressors.training.trainer import Losses
from nxm_export.errors import DataError, PlanError

# ``obs``, the default, fixes mask and weights by second-order pruning (`compressors.pruning.sparsegpt`) and spends all steps on masked QAT;
# ``magnitude`` does so with the mask by magnitude; ``nxm`` looks for the mask by ADMM first, ours (damped, distilled);
# ``sr-ste`` lets the mask follow the weight through most of the steps (Zhou et al. 2021, arXiv 2102.04010), then fixes it;
# ``one-shot`` is magnitude and calibration alone, no training; ``paper`` follows what is known of the authors' recipe.
RECIPES = ("obs", "nxm", "magnitude", "sr-ste", "one-shot", "paper")
# What masks are chosen by: |W|, or |W| times the root mean square of each input over the calibration samples.
MASK_SCORES = ("magnitude", "activation")
PAPER_DIFFERENCES = (
    "as the authors: one dual update per epoch, undamped; a constant penalty; no distillation; no training after projection; "
    "embeddings, norms and head frozen",
    "not as the authors: static per-tensor activations (theirs: dynamic per token); one weight scale per channel (theirs: "
    "per 32 rows); narrow weight range; exactly N kept per group; the penalty is added after clipping (theirs: before)",
)


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train. Steps win over epochs where both are given.

    What is None depends on the task and the model: see `compressors.training.default_recipe`.
    """

    dense_epochs: float = 3.0
    dense_steps: int | None = None
    dense_learning_rate: float = 5e-5
    dense_freeze_embeddings: bool = False
    epochs: float = 6.0
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    max_length: int | None = None
    recipe: str = "obs"
    admm: str = "mask"
    admm_share: float = 0.4
    dual_updates: int | None = None
    damping: float = 0.5
    strength: tuple[float, float] = (0.3, 5.0)
    residual_gate: float = 0.1
    sr_ste_share: float = 0.8  # of all steps; the mask is fixed for the rest
    sr_ste_decay: float = 2e-4  # the regulariser's weight, as in the authors' experiments
    distill: bool = True
    augment: float | None = (
        None  # share of the training samples that are distorted ones, for the teacher alone to answer
    )
    losses: Losses | None = None
    calibration_samples: int = 512
    percentile: float = 99.99
    # The most that one INT8 output may cost by itself (`compressors.training.output_sensitivity`); a costlier one stays in float. None: all INT8.
    output_limit: float | None = 0.005
    freeze_embeddings: bool = True
    precision: str = "auto"
    seed: int = 0
    threads: int | None = None
    gelu: str | None = None  # erf or tanh; None keeps the model's own
    permute: bool = False  # reorder channels where that changes nothing, so that patterns drop less
    mask_scores: str = "magnitude"  # one of MASK_SCORES

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise PlanError(f"unknown recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        if self.mask_scores not in MASK_SCORES:
            raise PlanError(f"unknown mask scores {self.mask_scores!r}; choose one of {', '.join(MASK_SCORES)}")
        if self.mask_scores != "magnitude" and self.recipe == "obs":
            raise PlanError("second-order pruning scores weights itself; leave --mask-scores out, or give --recipe nxm")
        if self.admm != "mask" and self.recipe not in ("nxm", "paper"):
            raise PlanError(f"--admm {self.admm} is for recipes with ADMM; give --recipe nxm")
        if self.batch_size < 1 or self.calibration_samples < 1:
            raise DataError("batch size and calibration samples must be at least 1")
        if not 0 < self.sr_ste_share <= 1 or self.sr_ste_decay < 0:
            raise DataError("sr-ste needs a share of the steps in (0, 1] and a decay of at least 0")
        if self.augment is not None and not 0 <= self.augment < 1:
            raise DataError(f"the share of augmented samples must be in [0, 1), got {self.augment}")
        if self.augment and (not self.distill or self.recipe == "paper"):
            raise DataError("augmented samples have no labels, and nothing is distilled; leave --augment out")
        if not 0 < self.percentile <= 100:
            raise DataError(f"the calibration percentile must be in (0, 100], got {self.percentile}")


def prepare_process(settings: Settings) -> None:
    """Set up this process for training: allocator, threads, and the other processes of ``torchrun``."""
    keep_freed_memory()
    distributed.start()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
