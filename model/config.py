"""Every number the learner depends on, frozen and validated once."""

from __future__ import annotations

from dataclasses import dataclass, replace

PERSONAL = 3  # parts that depend on the user; the others are columns of the items, the same for everyone
PARTS = ("tower", "covisitation", "text", "popular_now", "popular_lately", "popular", "new", "young")  # of the mix
BUCKETS = (1, 5, 20)  # edges of the history-length buckets 0 / 1-4 / 5-19 / 20+
PAUSES = (60_000, 86_400_000)  # ms, edges of the buckets of time since the user's last event: page, day, longer
RECENCY = 5.0  # events; a click counts exp(-position / 5) in the co-visitation and text parts
SHAPES = ("text_dim", "tower_dim", "covisitation_rank", "projected_text_dim", "heads", "hidden")  # of saved arrays
SITUATIONS = (len(BUCKETS) + 1) * (len(PAUSES) + 1)

PER_ITEM = (
    "tower.items", "tower.ids", "tower.bias", "covisitation.left", "covisitation.right", "text.items", "popularity",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Defaults come from the MovieLens-100k study (docs/decisions.md); lengths are in events unless named."""

    text_dim: int = 384  # E, width of the frozen text vectors
    tower_dim: int = 64  # d, item and user tower
    covisitation_rank: int = 64  # R, truncated SVD; 128 gained nothing on MovieLens-100k (.2020 against .2030 HR@10)
    projected_text_dim: int = 64  # P, text part of the vector
    history: int = 50  # newest events of a user that the model reads
    heads: int = 4  # recency heads of the user tower
    hidden: int = 128  # width of the user tower's MLP
    dropout: float = 0.4  # of the user tower's inputs
    id_dropout: float = 0.1  # share of items that a step shows by text alone
    text_scale: float = 0.3  # text's share beside the id embedding
    id_prior: float = 3.0  # id embedding counts n / (n + id_prior)
    micro_batch: int = 64
    replay: int = 32  # replayed windows a step
    learning_rate: float = 1.4e-3  # 7e-4, with replay 24 and dropout .3, cost .002 HR@10 on MovieLens-100k, line
    warmup_rate: float = 1e-3
    warmup_steps: int = 400  # extra replay steps while the stream is young
    warmup_steps_a_batch: int = 4
    full_softmax_items: int = 8192  # above it, the softmax runs over a sample of the seen items
    sampled_items: int = 4096
    window_events: int = 1_000_000  # replay window kept in memory
    refresh_events: int = 1000  # between two factorisations, or an eighth of the items; 2,000 cost .001 HR@10
    covisitation_half_life: float = 50_000.0
    covisitation_pairs: int = 20_000_000  # sparse counts kept at most
    popular_now_half_life: float = 125.0  # events; NDCG@10 of recent popularity peaks at 125 to 20,000 by stream
    popular_lately_half_life: float = 1_000.0
    popular_half_life: float = 20_000.0
    new_half_life: float = 350.0  # events since an item's first; what is new is easily overrated by its few events
    young_half_life: float = 3_500.0
    mix_candidates: int = 20  # of each part; more teach the tail instead of the top
    mix_half_life: float = 10_000.0  # events that the mix's weights rest on
    exclude_seen: bool = True  # a user's consumed items are no candidates
    same_stamp_history: bool = True  # False: events of one stamp do not see each other (baskets)

    @property
    def dim(self) -> int:
        """D: tower + its bias, co-visitation, text, and the columns that are the same for everyone."""
        return self.tower_dim + 1 + self.covisitation_rank + self.text_part + len(PARTS) - PERSONAL

    @property
    def text_part(self) -> int:
        """P, the width of the vector's text part: the texts' own where that is less."""
        return min(self.projected_text_dim, self.text_dim)

    def shaped_like(self, other: ModelConfig) -> ModelConfig:
        """These settings, with the shapes of another's arrays: how a learner goes on from its model."""
        return replace(self, **{name: getattr(other, name) for name in SHAPES})


def array_shapes(config: ModelConfig, num_items: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array beside the user tower's; all float32."""
    n, d, rank, text = num_items, config.tower_dim, config.covisitation_rank, config.text_part
    return {
        "tower.items": (n, d),
        "tower.ids": (n, d + 1),  # id embedding and bias, before the gate
        "tower.text": (d, config.text_dim),
        "tower.bias": (n,),
        "covisitation.left": (n, rank),
        "covisitation.right": (n, rank),
        "text.items": (n, text),
        "text.mean": (config.text_dim,),
        "text.projection": (config.text_dim, text),
        "popularity": (n, len(PARTS) - PERSONAL),
        "mix": (SITUATIONS, len(PARTS)),
    }
