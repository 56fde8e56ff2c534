import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, T5Config, T5Model

from model.encoder import Encoder, Pooling, folder_of, pool
from model.queries import unit

TEXTS = ["king", "a queen and her court in the castle by the sea", "", "tax return", "  \n", "king"] + [
    "word " * length for length in (60, 3, 17, 1, 40)
]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder("minilm", device="cpu")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder of random weights, with MiniLM's tokenizer without its padding token."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder_of("minilm"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    if request.param == "gpt2":
        net: Any = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2))
    else:
        net = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32,
            )
        )  # fmt: skip
    net.save_pretrained(folder)
    return folder


@contextmanager
def counted(encoder: Encoder) -> Iterator[list[int]]:
    """The batch size of every forward pass."""
    sizes: list[int] = []
    hook = encoder._net.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    yield sizes
    hook.remove()


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((a * b).sum(-1))


def test_rows_are_unit_and_in_the_order_of_the_texts(minilm: Encoder) -> None:
    rows = minilm.encode(TEXTS)
    assert rows.shape == (len(TEXTS), 384) and rows.dtype == np.float32
    has_text = np.array([bool(text.strip()) for text in TEXTS])
    assert np.allclose(np.linalg.norm(rows, axis=1), has_text, atol=1e-6)
    assert (rows[0] == rows[5]).all()
    single = np.concatenate([minilm.encode([text]) for text in TEXTS])
    assert (cosine(rows, single)[has_text] > 0.999).all()
    assert minilm.encode([]).shape == (0, 384)


def test_near_in_meaning_is_near(minilm: Encoder) -> None:
    king, queen, tax = minilm.encode(["a king", "a queen", "an income tax return"])
    assert king @ queen > 0.6 > 0.3 > king @ tax


def test_the_token_budget_cuts_batches(minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = minilm.encode(TEXTS)
    monkeypatch.setattr(minilm, "_tokens_at_once", 64)
    with counted(minilm) as sizes:
        assert (cosine(minilm.encode(TEXTS), whole) > 0.999).sum() == 9
    assert sum(sizes) == 8 and len(sizes) >= 4  # 8 different texts


def test_no_text_is_encoded_twice(minilm: Encoder, tmp_path: Path) -> None:
    encoder = Encoder("minilm", device="cpu", cache=tmp_path / "vectors.sqlite")
    with counted(encoder) as sizes:
        first = encoder.encode(TEXTS)
        assert sum(sizes) == 8
        assert (encoder.encode(TEXTS[::-1])[::-1] == first).all() and sum(sizes) == 8
        encoder.encode([*TEXTS, "one more"])
        assert sum(sizes) == 9
    again = Encoder("minilm", device="cpu", cache=tmp_path / "vectors.sqlite")
    with counted(again) as sizes:
        assert (again.encode(TEXTS) == first).all() and not sizes
    assert (minilm.encode(TEXTS) == first).all()  # the same without a cache


def test_another_encoder_does_not_read_the_vectors(tmp_path: Path) -> None:
    cache = tmp_path / "vectors.sqlite"
    mean = Encoder("minilm", "mean", device="cpu", cache=cache)
    cls = Encoder("minilm", "cls", device="cpu", cache=cache)
    assert cosine(mean.encode(["a king"]), cls.encode(["a king"]))[0] < 0.99
    assert mean.name.startswith("minilm:mean:256:") and cls.name.startswith("minilm:cls:256:")
    assert mean.name.rpartition(":")[2] == cls.name.rpartition(":")[2]


def test_last_token_of_a_decoder(decoder: Path) -> None:
    """Against the model called by hand on one unpadded text."""
    encoder = Encoder(decoder, "last", device="cpu", dtype=torch.float32)
    assert encoder.max_tokens == 32  # of the model, under the 256 asked for
    rows = encoder.encode(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        if text.strip():
            ids = encoder._tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                hidden = encoder._net(input_ids=ids).last_hidden_state[:, -1].numpy()
            assert cosine(unit(hidden)[0], row) > 0.9999
    assert cosine(rows[0], rows[3]) < 0.9999  # random weights still tell texts apart


def test_a_decoder_without_a_padding_token(decoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(decoder, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert (
        Encoder(folder, "last", device="cpu").encode(TEXTS) == Encoder(decoder, "last", device="cpu").encode(TEXTS)
    ).all()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_on_either_side(pooling: Pooling) -> None:
    tokens = torch.arange(12.0).reshape(1, 4, 3)
    padding = torch.full((1, 2, 3), 99.0)
    left, right = torch.cat([padding, tokens], 1), torch.cat([tokens, padding], 1)
    ones, zeros = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    expected = {"mean": tokens.mean(1), "cls": tokens[:, 0], "last": tokens[:, -1]}[pooling]
    assert torch.equal(pool(left, torch.cat([zeros, ones], 1), pooling), expected)
    assert torch.equal(pool(right, torch.cat([ones, zeros], 1), pooling), expected)


def test_weights_are_part_of_the_name(decoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(decoder, tmp_path / decoder.name)
    net = Encoder(folder, device="cpu")._net
    with torch.no_grad():
        next(net.parameters())[0, 0] += 1
    net.save_pretrained(folder)
    assert Encoder(folder, device="cpu").name != Encoder(decoder, device="cpu").name


def test_weights_that_overflow_are_refused(decoder: Path) -> None:
    encoder = Encoder(decoder, device="cpu")
    with torch.no_grad():
        next(encoder._net.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        encoder.encode(["a king"])


def test_only_safetensors_are_read(decoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(decoder, tmp_path / "pickle")
    torch.save(Encoder(decoder, device="cpu")._net.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        Encoder(folder, device="cpu")


def test_a_decoder_behind_an_encoder_is_refused(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(folder_of("minilm")).save_pretrained(tmp_path)
    T5Model(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an encoder with a decoder"):
        Encoder(tmp_path, device="cpu")
