"""What the tests of the data share: small tokenizers, files of rows, and a cache of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_isdpo.data.datamodule import PreferenceDataModule, TextDataModule

RANKED: list[dict[str, Any]] = [
    {"prompt": "a", "responses": ["1", "2", "3"], "scores": [1, 2, 3]},
    {"prompt": "b", "responses": ["1", "2"], "scores": [1, 1]},
    {"prompt": "c", "responses": ["1", " ", "3"], "scores": [3, 2, 1]},
    {"prompt": "d", "responses": ["1", "2"], "scores": [1, 2]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "extracted")


def _make_tokenizer(
    *, bos: bool = True, eos: bool = False, eos_token: str = "<eos>", template: str | None = None, pad: bool = True
) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    form = "<bos> " * bos + "$A" + " <eos>" * eos
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=eos_token,
        pad_token="<pad>" if pad else None,
        chat_template=template,
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE without merges: a token a byte, so that ids can be read off a text."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    _make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict[str, Any]]], str]:
    """Writes JSON lines."""

    def write(path: Path, rows: list[dict[str, Any]]) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def pairs(num: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows that tell their number."""
    return [
        {"prompt": f"{i:03}", "chosen": f" {i}", "rejected": f" -{i}", "weight": i / 2, "margin": 1}
        for i in range(first, first + num)
    ]


@pytest.fixture
def folder(tmp_path: Path, write_rows: Callable[[Path, list[dict[str, Any]]], str]) -> Path:
    """22 training, 5 validation and 3 test rows."""
    for name, num, first in (("train", 22, 0), ("val", 5, 100), ("test", 3, 200)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", pairs(num, first))
    return tmp_path / "data"


@pytest.fixture
def make(folder: Path, tokenizer_path: str) -> Callable[..., TextDataModule]:
    """Makes a data module, of the rows of ``folder`` unless others are named."""

    def make(cls: type[TextDataModule] = PreferenceDataModule, **options: Any) -> TextDataModule:
        return cls(**{"train": str(folder), "tokenizer": tokenizer_path, "batch_size": 4} | options)

    return make
