from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sequences
from benchmarks.minilm import Batches, Tokenizer, cosine_loss, sentences
from sluice.core.errors import SluiceError

ROW: dict[str, Any] = {
    "share": 0.48, "budget_share": 0.5, "promise_error": -0.02, "rounds": 1, "dense": 95.0, "slim": 94.0,
}  # fmt: skip


def test_runs_are_kept_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def perform(run: str, folder: Path) -> dict[str, Any]:
        done.append(run)
        return ROW

    monkeypatch.setattr(sequences, "perform", perform)
    result = tmp_path / "result.json"
    common = ["--folder", str(tmp_path / "runs"), "--result", str(result)]
    assert sequences.main(["--runs", "gru-50", *common]) == 0
    assert sequences.main(["--runs", "vit-25", "gru-50", *common]) == 0
    assert done == ["gru-50", "vit-25"]
    assert json.loads(result.read_text()) == {"vit-25": ROW, "gru-50": ROW}


def test_rows_of_another_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "perform", lambda run, folder: ROW)
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"vit-50": {**ROW, "slim": 90.0}, "gru-50": {**ROW, "slim": 91.0}}))
    assert sequences.main(["--runs", "gru-50", "--folder", str(tmp_path / "runs"), "--result", str(result)]) == 0
    assert json.loads(result.read_text()) == {"vit-50": {**ROW, "slim": 90.0}, "gru-50": ROW}


def test_what_was_published_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert sequences.main(["--show"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)
    assert [line.split(":")[0] for line in lines] == list(rows)
    for row in rows.values():
        assert row["met"] == (row["share"] <= row["budget_share"])


@pytest.mark.parametrize("name", sequences.NETWORKS)
def test_thinner_networks_have_the_same_layers(name: str) -> None:
    network = sequences.NETWORKS[name]
    dense, thin = network.make(), network.thin(1)
    assert list(dict(dense.named_parameters())) == list(dict(thin.named_parameters()))
    sizes = [sum(p.numel() for p in network.thin(k).parameters()) for k in range(1, 9)]
    assert sizes == sorted(sizes) and sizes[-1] == sum(p.numel() for p in dense.parameters())


def test_words_are_cut_into_the_longest_known_pieces() -> None:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##aff", "##able", "a", "cafe", "."]
    tokenizer = Tokenizer({word: k for k, word in enumerate(words)})
    tokens, counts = tokenizer("Unaffable, a Café.", 12)
    assert tokens.tolist() == [1, 4, 5, 6, 3, 7, 8, 9, 2, 0, 0, 0] and counts.tolist() == [1] * 9 + [0] * 3
    assert tokenizer("a a a a", 4)[0].tolist() == [1, 7, 7, 2]


def test_batches_hold_every_sentence_once() -> None:
    tokens = torch.arange(40).view(40, 1)
    batches = list(Batches(tokens, tokens, torch.Generator().manual_seed(1)))
    assert sorted(int(t) for batch in batches for t in batch["tokens"]) == list(range(40))
    assert cosine_loss(torch.eye(3), torch.eye(3), None).item() == 0.0


@pytest.mark.slow
def test_sentences_are_english_prose_and_always_the_same() -> None:
    found = sentences(50)
    assert found == sentences(50) and len(set(found)) == 50
    assert all(5 <= len(one.split()) <= 30 and one[-1] in ".!?" for one in found)
    with pytest.raises(SluiceError, match="ask for fewer"):
        sentences(10**6)
