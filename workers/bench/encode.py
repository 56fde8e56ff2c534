"""Item texts a second through `Encoder`, against plain transformers with the same weights in naive batches.

Naive: texts as they come, 32 at a time, padded to the longest of the batch, float32, mean of the tokens. Beside them
`Encoder` in float32, and with its linear layers quantised to int8 as they run. And what each one's vectors are worth:
cosine to the naive ones, and NDCG@10 of the product that learns a recorded stream from them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from model.arms.catalogue import Setting, make_arm
from model.encoder import Encoder, folder_of
from model.evaluate import replayed
from model.outcome import Ranks, bootstrap
from model.queries import Vectors, unit
from stream.datasets import load_dataset
from stream.text import item_text
from workers.bench.harness import Options, alternate, medians, ratio, seconds
from workers.training_input import events_of

NAIVE_BATCH, MAX_TOKENS = 32, 256


def mixed_texts(count: int) -> list[str]:
    """Film descriptions joined to lengths of a catalogue: most of some ten words, a few of hundreds."""
    pieces, draw = [item.text for item in load_dataset("ml-100k").items], np.random.default_rng(0)
    lengths = np.maximum(1, draw.lognormal(0.8, 1.0, count)).astype(int)
    return [" ".join(draw.choice(pieces, length)) for length in lengths]


def naive(device: torch.device) -> Callable[[Sequence[str]], Vectors]:
    folder = folder_of("minilm")
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).to(device).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Vectors:
        vectors = []
        for start in range(0, len(texts), NAIVE_BATCH):
            part = list(texts[start : start + NAIVE_BATCH])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            inputs = inputs.to(device)
            hidden = net(**inputs).last_hidden_state  # (b, T, E)
            mask = inputs["attention_mask"].unsqueeze(-1)  # (b, T, 1)
            vectors.append(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())
        return unit(np.concatenate(vectors))

    return encode


def quantised() -> Encoder:
    encoder = Encoder("minilm", max_tokens=MAX_TOKENS, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):  # it is to move to torchao
        encoder._net = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            encoder._net, {torch.nn.Linear}, dtype=torch.qint8
        )
    return encoder


def ranked(encode: Callable[[Sequence[str]], Vectors], count: int) -> Ranks:
    """Of the first `count` MovieLens events, line by line, the second half of them counted."""
    dataset = load_dataset("ml-100k")
    events = events_of(dataset.events[:count], lambda _: 1.0)
    clicked = set(events.items)
    items = {item.item_id: item_text(item) for item in dataset.items if item.item_id in clicked}
    text = encode(list(items.values()))  # (N, E)
    arm = make_arm("upwell", Setting(list(items), text, "line", count, count // 2))
    return replayed(arm, events, list(items), "line").new().after(count // 2)


def worth(contenders: Mapping[str, Callable[[Sequence[str]], Vectors]], count: int) -> dict[str, float]:
    """NDCG@10 from each one's vectors, and its difference to that from the naive ones, with the 95 % interval."""
    found = {name: ranked(encode, count) for name, encode in contenders.items()}
    values = {f"ndcg@10 {name}": ranks.metrics()["ndcg@10"] for name, ranks in found.items()}
    for name in found.keys() - {"naive"}:
        gained = found[name].gains()["ndcg@10"] - found["naive"].gains()["ndcg@10"]
        ends = zip(("", " low", " high"), (gained.mean(), *bootstrap(gained, found[name].users)), strict=True)
        values |= {f"ndcg@10 {name} - naive{end}": float(value) for end, value in ends}
    return values


def texts_per_s(encode: Callable[[Sequence[str]], Vectors], texts: Sequence[str]) -> float:
    return len(texts) / seconds(lambda: encode(texts))


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    texts = mixed_texts(options.scaled(1_000, 48))
    encoder = Encoder("minilm", max_tokens=MAX_TOKENS)
    contenders = {"upwell": encoder.encode, "naive": naive(encoder.device)}
    contenders["float32"] = Encoder("minilm", max_tokens=MAX_TOKENS, dtype=torch.float32).encode
    if encoder.device.type == "cpu":
        contenders["int8"] = quantised().encode
    vectors = {name: encode(texts) for name, encode in contenders.items()}
    runs = alternate({name: partial(texts_per_s, encode, texts) for name, encode in contenders.items()}, options.rounds)
    values = {f"texts_per_s {name}": figure for name, figure in medians(runs).items()}
    for name in contenders.keys() - {"naive"}:
        values[f"lowest_cosine {name}"] = float((vectors[name] * vectors["naive"]).sum(axis=1).min())
    values |= worth(contenders, options.scaled(20_000, 300))
    values |= {"dtype": str(encoder.dtype), "device": device_name(encoder.device), "texts": float(len(texts))}
    return {f"{name} / naive": ratio(runs, name, "naive") for name in contenders.keys() - {"naive"}}, values


def device_name(device: torch.device) -> str:
    """The card's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread: no GPU figure exists"
