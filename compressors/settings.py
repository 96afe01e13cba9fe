"""How a model is fine-tuned and compressed: recipe, phases, optimizer steps, learning rates. Loads no torch.

A field with an `Option` is an option of the command line, too (`nxm_export.contract.options`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nxm_export.contract.encoder_family import GELUS
from nxm_export.contract.options import OPTION, Option, options_of
from nxm_export.contract.token_budget import DEFAULT_MAX_LENGTH
from nxm_export.errors import DataError, PlanError

# ``admm``, the default, fixes masks, weights and scales by layer-wise ADMM (`compressors.pruning.layerwise`) and spends
# all steps on masked QAT; ``obs-refit`` does so with the masks of second-order pruning and the rest of that solver,
# ``obs`` with second-order pruning alone (`compressors.pruning.sparsegpt`), ``magnitude`` with the mask by magnitude;
# ``nxm`` looks for the mask by ADMM on the loss of the task first, ours (damped, distilled); ``sr-ste`` lets the mask
# follow the weight through most of the steps (Zhou et al. 2021, arXiv 2102.04010), then fixes it; ``one-shot`` is
# magnitude and calibration alone, no training; ``paper`` follows what is known of the authors' recipe (docs/recipes.md
# says where it differs).
RECIPES = ("admm", "obs-refit", "obs", "nxm", "magnitude", "sr-ste", "one-shot", "paper")
# Those that look at the inputs of layers to choose masks, and start near the dense model.
SECOND_ORDER = ("admm", "obs-refit", "obs")
REFITTING = ("admm", "obs-refit")  # whose weights are fitted to what layers read
# What masks are chosen by: |W|, or |W| times the root mean square of each input over the calibration samples.
MASK_SCORES = ("magnitude", "activation")
# ADMM's constraint set: the pattern, or pattern and grid together (without and with fake quantization in the forward
# pass).
ADMM_KINDS = ("mask", "joint", "joint-ste")
PRECISIONS = ("auto", "fp32", "bf16")
START_PERCENTILE = 99.99  # of |x|: where the ranges of activations that training moves begin
# The settings that change the dense model, and those that dense fine-tuning and compression share.
DENSE_FIELDS = ("dense_epochs", "dense_steps", "dense_learning_rate", "dense_freeze_embeddings")
_MAX_LENGTH_HELP = (
    f"Longest input in tokens.  [default: {DEFAULT_MAX_LENGTH}; of embeddings, what they were made for; less where the "
    "model allows less]"
)
SHARED_FIELDS = ("batch_size", "max_length", "precision", "seed")


@dataclass(frozen=True)
class Losses:
    """Weights of the loss terms: the task's own, the teacher's logits, the teacher's hidden states."""

    task: float = 1.0
    logits: float = 0.0
    hidden: float = 0.0


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train. Steps win over epochs where both are given.

    What is None depends on the task and the model: see `compressors.training.default_recipe`. `augment` is the share of
    distorted ones, for the teacher alone to answer, among the training samples but for the first of every batch. An
    INT8 output that costs a sample more than `output_limit` by itself (`compressors.training.output_sensitivity`) stays
    in float; None: all are INT8.
    """

    recipe: str = field(
        default="admm",
        metadata={
            OPTION: Option(
                "Where masks come from: layer-wise ADMM, second-order pruning, magnitude, ... (docs/recipes.md).",
                choices=RECIPES,
            )
        },
    )
    admm: str = field(
        default="mask", metadata={OPTION: Option("ADMM's constraint set, for --recipe nxm.", choices=ADMM_KINDS)}
    )
    mask_scores: str = field(
        default="magnitude",
        metadata={
            OPTION: Option(
                "What other recipes choose masks by: |W|, or |W| times the size of each input.", choices=MASK_SCORES
            )
        },
    )
    permute: bool = field(
        default=False, metadata={OPTION: Option("Reorder channels where that changes nothing, so that N:M drops less.")}
    )
    augment: float | None = field(
        default=None,
        metadata={
            OPTION: Option(
                "Share of training samples with tokens dropped, replaced and swapped, but for the first of every "
                "batch. Where there are any, the teacher alone is learned from.  "
                "[default: 0.7 for classification, else 0]",
                least=0,
                below=1,
            )
        },
    )
    output_limit: float | None = field(
        default=0.005,
        metadata={
            OPTION: Option(
                "The most that one INT8 output into residual, rotation or gate may cost a sample, in nats; a costlier "
                "one stays in float. inf: all INT8.",
                least=0,
                infinity_is_none=True,
            )
        },
    )
    epochs: float = field(
        default=6.0, metadata={OPTION: Option("Epochs of compression, all phases together.", above=0)}
    )
    steps: int | None = field(
        default=None,
        metadata={OPTION: Option("Optimizer steps of compression; wins over --epochs. 0: without training.", least=0)},
    )
    dense_epochs: float = field(
        default=3.0, metadata={OPTION: Option("Epochs of dense fine-tuning, where it is needed.", above=0)}
    )
    dense_steps: int | None = field(
        default=None,
        metadata={OPTION: Option("Optimizer steps of dense fine-tuning; wins over --dense-epochs.", least=1)},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            OPTION: Option(
                "Of compression.  [default: 1e-4; with --augment or --more-text, 3e-4 unless masks come by admm or "
                "obs, less for models wider than 384]",
                above=0,
            )
        },
    )
    average: float = field(
        default=0.1,
        metadata={
            OPTION: Option(
                "Share of the last steps whose weights are averaged. 0: the weights of the last step.", least=0, most=1
            )
        },
    )
    dense_learning_rate: float = field(default=5e-5, metadata={OPTION: Option(above=0)})
    batch_size: int = field(default=32, metadata={OPTION: Option("Samples per optimizer step.", least=1)})
    max_length: int | None = field(default=None, metadata={OPTION: Option(_MAX_LENGTH_HELP, least=2)})
    distill: bool = field(default=True, metadata={OPTION: Option("Learn from the dense model.")})
    gelu: str | None = field(
        default=None,
        metadata={OPTION: Option("Train and export this GELU.  [default: the model's own]", choices=tuple(GELUS))},
    )
    freeze_embeddings: bool = field(
        default=True,
        metadata={
            OPTION: Option("Train embedding tables during compression, too.", flag="--train-embeddings", negates=True)
        },
    )
    precision: str = field(
        default="auto",
        metadata={OPTION: Option("Of training; auto: bf16 where products are faster in it.", choices=PRECISIONS)},
    )
    seed: int = field(default=0, metadata={OPTION: Option(least=0, most=2**32 - 1)})
    threads: int | None = field(
        default=None, metadata={OPTION: Option("CPU threads of training.  [default: all cores]", least=1)}
    )
    # No options from here on.
    dense_freeze_embeddings: bool = False
    admm_share: float = 0.4  # of all steps
    dual_updates: int | None = None
    damping: float = 0.5
    strength: tuple[float, float] = (0.3, 5.0)
    residual_gate: float = 0.1
    sr_ste_share: float = 0.8  # of all steps; the mask is fixed for the rest
    sr_ste_decay: float = 2e-4  # the regulariser's weight, as in the authors' experiments
    losses: Losses | None = None
    calibration_samples: int = 512
    percentile: float | None = None  # of |x|, that ranges reach to

    def __post_init__(self) -> None:
        for name, entry in options_of(self):
            entry.require(name, getattr(self, name))
        if self.mask_scores != "magnitude" and self.recipe in SECOND_ORDER:
            raise PlanError(
                f"--recipe {self.recipe} scores weights itself; leave --mask-scores out, or give --recipe nxm"
            )
        if self.admm != "mask" and self.recipe not in ("nxm", "paper"):
            raise PlanError(f"--admm {self.admm} is for recipes with ADMM; give --recipe nxm")
        if self.steps == 0 and self.recipe in ("nxm", "sr-ste", "paper"):
            raise PlanError(f"--recipe {self.recipe} finds its masks in training; give it steps, or another recipe")
        if self.calibration_samples < 1:
            raise DataError(f"calibration samples must be at least 1, got {self.calibration_samples}")
        if not 0 < self.sr_ste_share <= 1 or self.sr_ste_decay < 0:
            raise DataError("sr-ste needs a share of the steps in (0, 1] and a decay of at least 0")
        if self.augment and not self.has_teacher:
            raise DataError("augmented samples have no labels, and nothing is distilled; leave --augment out")
        if self.recipe == "paper" and not self.freeze_embeddings:
            raise PlanError(
                "--recipe paper trains the compressed matrices alone; leave --train-embeddings out, or take another "
                "recipe"
            )
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise DataError(f"the calibration percentile must be in (0, 100], got {self.percentile}")

    @property
    def range_percentile(self) -> float | None:
        """The percentile of |x| that activations' ranges reach to at first; None: those of least squared error.

        Training moves ranges, and its defaults were found from `START_PERCENTILE`. Without it they stay, and what that
        percentile cuts off is what a few tokens carry: it cost more than all else (docs/research-notes.md).
        """
        return START_PERCENTILE if self.percentile is None and self.trains else self.percentile

    @property
    def trains(self) -> bool:
        """Whether compression takes optimizer steps at all."""
        return self.recipe != "one-shot" and self.steps != 0

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model teaches, where anything is trained."""
        return self.distill and self.recipe != "paper"

    def require_dev(self, dev: str | None) -> None:
        """Raise `DataError` where something is trained and no `dev` data say what came of it."""
        if dev is None and self.trains:
            raise DataError(
                "without dev data nothing says what training did to the answers; give --dev (dev=...), or train "
                "nothing: --steps 0 (Settings(steps=0))"
            )

    def require_taught(self, option: str) -> None:
        """Raise `DataError` where no teacher answers the texts without labels that `option` brings."""
        if not (self.trains and self.has_teacher):
            why = "nothing is distilled" if self.trains else "nothing is trained"
            raise DataError(
                f"{option} brings texts without labels for the dense model to answer, and {why}; leave it out"
            )

    def dense_part(self) -> dict[str, object]:
        """The settings that the dense model depends on, by name: compressing in another way must not train it again."""
        return {name: getattr(self, name) for name in (*DENSE_FIELDS, *SHARED_FIELDS)}
