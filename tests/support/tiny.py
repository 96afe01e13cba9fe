"""Tiny seeded models, a tokenizer and data sets, made on the spot: no download, no binary fixtures.

A model has 2 blocks of hidden size 32; its weights are random, its vocabulary is `WORDS`. A sentence has good
words or bad ones, so 60 training steps (two seconds) learn the classification data.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from nxm_export.hf.protocols import AutoClass

GOOD = ("good", "great", "fine", "superb", "lovely", "warm", "clever", "bright")
BAD = ("bad", "poor", "dull", "awful", "weak", "cold", "silly", "dark")
NEUTRAL = (
    "a",
    "the",
    "film",
    "story",
    "scene",
    "with",
    "and",
    "in",
    "of",
    "actor",
    "plot",
    "very",
    "two",
    "long",
    "new",
)
WORDS = (*GOOD, *BAD, *NEUTRAL)
# Of the families that `make test` runs wherever all of them are tried: those with a block of another form each.
SHORT = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert")
# Families whose blocks, masks and heads are those of another one: what takes long is not tried with them but by
# `pytest -m exhaustive`.
ALIKE = ("xlm-roberta", "camembert", "gte", "jina_embeddings_v3")
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert", "mpnet")  # in special tokens, and positions behind padding
FAMILIES = (
    *("bert", "roberta", "distilbert", "electra", "albert"),
    *("xlm-roberta", "camembert", "mpnet", "modernbert", "nomic_bert", "gte", "jina_embeddings_v3"),
    "deberta-v2",
)
DISTINCT = tuple(family for family in FAMILIES if family not in ALIKE)
LIKE_DEBERTA_V3 = {  # but for its sizes; there are more distances than buckets for them
    "relative_attention": True,
    "position_buckets": 8,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
WITH_TYPES = ("bert", "electra", "albert", "nomic_bert")  # whose inputs have kinds of tokens
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32, 64, 2, 4
POSITIONS = 48  # longest input in tokens
CLASSES = {
    "regression": ("score",),
    "multi-label": ("bad", "good", "long"),
    "token-classification": ("O", "B-BAD", "B-GOOD"),
    "reranking": ("score",),
    "question-answering": ("start", "end"),
}
CANDIDATES = 4  # of a query
QUESTION = "the good scene"
TRAIN_SAMPLES, DEV_SAMPLES = 192, 64


def write_model(
    family: str,
    out: Path,
    *,
    head: str | None = None,
    classes: tuple[str, ...] = ("0", "1"),
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    layers: int = LAYERS,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face directory with random weights and its tokenizer to `out`, and return it.

    `head` is None for an encoder alone (what pretraining leaves), else a task; `classes` are those of
    ``classification``. For ``embedding`` it is a sentence-transformers directory with the mean of the tokens, at length
    1. `options` are more fields of an ALBERT's, a BERT's, a DeBERTa's or a ModernBERT's configuration.
    """
    import torch
    import transformers

    from nxm_export.contract.pooling import Pooling, write_pooling
    from nxm_export.contract.tasks import TASKS
    from nxm_export.hf.sentence_embedding import embedding_model

    torch.manual_seed(seed)
    config = _config(family, hidden, intermediate, layers, options)
    if head is None:
        model = cast("AutoClass", transformers.AutoModel).from_config(config)
    elif head == "embedding":
        pooling = Pooling("mean", normalize=True)
        model = embedding_model(family, pooling)(config)
        out.mkdir(parents=True, exist_ok=True)
        write_pooling(out, pooling, hidden, POSITIONS, out)
    else:
        task = TASKS[head]
        names = classes if head == "classification" else CLASSES[head]
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        if head != "classification":  # as in published checkpoints, which seldom say so of classifiers
            config.problem_type = task.problem_type
        model = cast("AutoClass", getattr(transformers, str(task.auto_class))).from_config(config)
    # As in trained models: untrained biases are all 0, and what changes them would show in no test.
    shift = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases, and the weights of norms
                parameter.add_(torch.randn(parameter.shape, generator=shift), alpha=0.05)
    model.save_pretrained(out, save_original_format=False)
    write_tokenizer(family, out)
    return out


def matrices(family: str, layers: int = LAYERS, *, split: bool = False) -> int:
    """How many compressible matrices a family's tiny models have; `split`: with each part of a fused one for itself."""
    from nxm_export.contract.families import FAMILIES as KNOWN

    parts = sum(len(linear.parts) - 1 for linear in KNOWN[family].linears if linear.parts) if split else 0
    return (len(KNOWN[family].linears) + parts) * (1 if family == "albert" else layers)


def pad_id(family: str) -> int:
    """The id of padding in a family's tiny models."""
    return 1 if family in LIKE_ROBERTA else 0


def inputs(family: str) -> tuple[str, ...]:
    """What the graphs of a family's tiny models read."""
    return ("input_ids", "attention_mask", "token_type_ids")[: 3 if family in WITH_TYPES else 2]


def write_tokenizer(family: str, out: Path) -> None:
    """Write ``tokenizer.json`` (whole words of `WORDS`) and ``tokenizer_config.json`` of a family."""
    out.mkdir(parents=True, exist_ok=True)
    special = _special(family)
    tokenizer(family).save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def tokenizer(family: str = "bert") -> Any:
    """A `tokenizers.Tokenizer` that splits at white space and puts the family's special tokens around."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = _special(family)
    order = [special[key] for key in _VOCABULARY_ORDER[family in LIKE_ROBERTA]] + list(WORDS)
    vocabulary = {token: i for i, token in enumerate(order)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = special["cls_token"], special["sep_token"]
    between = f"{last} {last}" if family in LIKE_ROBERTA else last
    second = ":1" if family in WITH_TYPES else ":0"
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {between} $B{second} {last}{second}",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    made.add_special_tokens(list(dict.fromkeys(special.values())))
    return made


def write_data(out: Path, task: str = "classification", *, pairs: bool = False, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.tsv`` and ``dev.tsv`` to `out` (columns ``sentence``, ``sentence2`` with `pairs`, ``label``) and
    return them; for token classification ``train.jsonl`` and ``dev.jsonl`` (``tokens``, ``tags``), for reranking the
    columns ``query``, ``document`` and ``relevance``, for question answering ``train.jsonl`` (``question``,
    ``context``, ``answers``) and ``dev.json``, in SQuAD's form.

    Labels are 1 when good words outnumber bad ones; regression labels are the difference of the two counts; the labels
    of multi-label say which kinds of words there are, the tags which kind each word is. Sentences are as similar as
    they share words, and documents as relevant as they hold good words. Answers are the good words of a text that has
    them in one place; every eighth text is longer than the model's input.
    """
    out.mkdir(parents=True, exist_ok=True)
    if task == "question-answering":
        return _write_questions(out, seed)
    suffix = "jsonl" if task == "token-classification" else "tsv"
    files = (out / f"train.{suffix}", out / f"dev.{suffix}")
    for number, (file, count) in enumerate(zip(files, (TRAIN_SAMPLES, DEV_SAMPLES), strict=True)):
        rng = random.Random(seed * 2 + number)
        lines: list[str] = []
        while len(lines) < count:
            kinds = (
                (GOOD, BAD) if task == "classification" or task == "regression" else (GOOD, BAD, GOOD + BAD, NEUTRAL)
            )
            words = rng.choices(NEUTRAL, k=rng.randint(1, 8)) + rng.choices(rng.choice(kinds), k=rng.randint(1, 4))
            rng.shuffle(words)
            if task == "token-classification":
                tags = ["B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O" for word in words]
                lines.append(json.dumps({"tokens": words, "tags": tags}))
                continue
            if task == "embedding":
                other = rng.sample(words, rng.randint(0, len(words))) + rng.choices(WORDS, k=rng.randint(1, 4))
                shared = len(set(words) & set(other)) / len(set(words) | set(other))
                lines.append(f"{' '.join(words)}\t{' '.join(other)}\t{shared:.3f}")
                continue
            if task == "reranking":
                group = len(lines) // CANDIDATES
                query = f"{NEUTRAL[group % len(NEUTRAL)]} {WORDS[group % len(WORDS)]} film"
                lines.append(f"{query}\t{' '.join(words)}\t{sum(word in GOOD for word in words)}")
                continue
            half = len(words) // 2
            texts = [" ".join(words[:half]), " ".join(words[half:])] if pairs else [" ".join(words)]
            lines.append("\t".join([*texts, _label(task, words)]))
        if suffix == "tsv":
            header = {"embedding": "sentence1\tsentence2\tscore", "reranking": "query\tdocument\trelevance"}
            lines.insert(0, header.get(task, "sentence\tsentence2\tlabel" if pairs else "sentence\tlabel"))
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def copy_dense(checkpoint: Path, home: Path) -> Path:
    """`home` with a copy of the ``dense`` model that a tiny checkpoint was made from, ``train.tsv`` and ``dev.tsv``."""
    shutil.copytree(checkpoint.parent / "dense", home / "dense")
    for name in ("train.tsv", "dev.tsv"):
        shutil.copyfile(checkpoint.parent / name, home / name)
    return home


def _write_questions(out: Path, seed: int) -> tuple[Path, Path]:
    found: list[list[dict[str, Any]]] = []
    for number, count in enumerate((TRAIN_SAMPLES, DEV_SAMPLES)):
        rng = random.Random(seed * 2 + number)
        found.append([])
        for i in range(count):
            sizes = (20, 40) if i % 8 == 0 else (1, 6)
            before, behind = (rng.choices(NEUTRAL, k=rng.randint(*sizes)) for _ in range(2))
            answer = " ".join(rng.choices(GOOD, k=rng.randint(1, 3)))
            context = " ".join([*before, answer, *behind])
            start = len(" ".join(before)) + 1
            found[-1].append({"context": context, "answers": {"text": [answer], "answer_start": [start]}})
    files = (out / "train.jsonl", out / "dev.json")
    lines = [json.dumps({"question": QUESTION, **row}) for row in found[0]]
    files[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": str(i),
                    "question": QUESTION,
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for i, row in enumerate(found[1])
    ]
    squad = {"version": "1.1", "data": [{"title": "tiny", "paragraphs": paragraphs}]}
    files[1].write_text(json.dumps(squad), encoding="utf-8")
    return files


def _label(task: str, words: list[str]) -> str:
    good, bad = (sum(word in kind for word in words) for kind in (GOOD, BAD))
    if task == "multi-label":
        kinds = {"bad": bad > 0, "good": good > 0, "long": "long" in words}
        return ";".join(name for name, there in kinds.items() if there)
    return str(int(good > bad)) if task == "classification" else f"{(good - bad) / 2:.1f}"


def compress_tiny(
    family: str,
    out: Path,
    *,
    task: str = "classification",
    spec: str = "2:4+W8",
    placement: str = "inputs-outputs",
    embedding: str = "float",
    steps: int = 8,
    dense_steps: int = 60,
    settings: Mapping[str, Any] | None = None,
    more_text: float | None = None,
) -> Path:
    """Fine-tune and compress a tiny model for real, into ``out/dense`` and ``out/checkpoint``; returns the checkpoint.

    ``out/encoder`` is the model it started from, ``out/train.tsv`` and ``out/dev.tsv`` its data. `settings` are more
    fields of `compressors.training.compress.Settings`; with a share of `more_text`, other texts are trained on without
    their labels.
    """
    from compressors.models import resolve
    from compressors.settings import Settings
    from compressors.training.compress import compress, finetune
    from nxm_export.contract.plan import WeightSpec
    from nxm_export.data.more_text import MoreText

    encoder = write_model(family, out / "encoder", head="embedding" if task == "embedding" else None)
    train, dev = write_data(out, task)
    chosen = Settings(
        **{
            "steps": steps,
            "dense_steps": dense_steps,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "dense_learning_rate": 3e-3,
            "calibration_samples": 64,
            "precision": "fp32",
            **(settings or {}),
        }
    )
    data: dict[str, Any] = {"task": task, "train": str(train), "dev": str(dev), "settings": chosen}
    finetune(encoder, out=out / "dense", **data)
    source = resolve(out / "dense")
    plan = source.family.uniform_plan(source.config, WeightSpec.parse(spec), placement=placement, embedding=embedding)
    other = None if more_text is None else MoreText((str(write_data(out / "other", task, seed=9)[0]),), more_text)
    compress(out / "dense", plan=plan, out=out / "checkpoint", more_text=other, **data)
    return out / "checkpoint"


_VOCABULARY_ORDER = (
    ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"),  # RoBERTa: <s> <pad> </s> <unk>, so pad_id is 1
)


def _special(family: str) -> dict[str, str]:
    names = ("pad", "unk", "cls", "sep", "mask")
    if family in LIKE_ROBERTA:
        return {
            f"{name}_token": token
            for name, token in zip(names, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"), strict=True)
        }
    return {f"{name}_token": f"[{name.upper()}]" for name in names}


def _config(family: str, hidden: int, intermediate: int, layers: int, options: Mapping[str, Any] | None = None) -> Any:
    import transformers

    # Wider than the usual 0.02: a tiny network with tiny weights would compute next to nothing.
    common: dict[str, Any] = {"vocab_size": len(WORDS) + 5, "initializer_range": 0.1, "pad_token_id": 0}
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    like_roberta: dict[str, Any] = {
        **common,
        **sizes,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": POSITIONS + 2,  # positions count from pad_token_id + 1
    }
    windows: dict[str, Any] = {
        "local_attention": 8,
        "layer_types": (["full_attention", "sliding_attention"] * layers)[:layers],
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    made: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**{**common, **sizes, **(options or {})}),
        "roberta": lambda: transformers.RobertaConfig(**like_roberta, type_vocab_size=1),
        "distilbert": lambda: transformers.DistilBertConfig(
            **common,
            dim=hidden,
            hidden_dim=intermediate,
            n_layers=layers,
            n_heads=HEADS,
            max_position_embeddings=POSITIONS,
        ),
        # An embedding size of its own, as in every published ELECTRA: a projection stands between it and the encoder.
        "electra": lambda: transformers.ElectraConfig(**common, **sizes, embedding_size=hidden // 2),
        # One block for all layers, and tanh-GELU, as in every published ALBERT.
        "albert": lambda: transformers.AlbertConfig(**common, **sizes, embedding_size=hidden // 2, **(options or {})),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**like_roberta, type_vocab_size=1),
        "camembert": lambda: transformers.CamembertConfig(**like_roberta, type_vocab_size=1),
        "mpnet": lambda: transformers.MPNetConfig(**like_roberta),
        # Windows shorter than the inputs, and a block of either kind.
        "modernbert": lambda: transformers.ModernBertConfig(**{**common, **sizes, **windows, **(options or {})}),
        "nomic_bert": lambda: transformers.NomicBertConfig(**common, **sizes),
        "gte": lambda: transformers.GteConfig(**common, **sizes),
        "jina_embeddings_v3": lambda: transformers.JinaEmbeddingsV3Config(**common, **sizes),
        "deberta-v2": lambda: transformers.DebertaV2Config(**{**common, **sizes, **LIKE_DEBERTA_V3, **(options or {})}),
    }
    return made[family]()
