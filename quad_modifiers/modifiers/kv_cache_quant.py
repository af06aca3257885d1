"""KVCacheQuant: keys and values in 4 bits."""

import logging
from collections.abc import Sequence
from typing import ClassVar, Literal

from llmcompressor.modifiers import Modifier
from pydantic import Field

from quad_modifiers.checkpoint.cache_section import NAME, KVCacheSection
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.modifiers.dynamic_act_quant import ClipRatio
from quad_modifiers.nn.kv_cache import KVCacheFormat, install_kv_cache
from quad_modifiers.passes.cache_means import cache_means

logger = logging.getLogger(__name__)

_WINDOWS = 8  # that means are taken over


class KVCacheQuant(QuadModifier):
    """Stores keys and values in 4 bits while a model generates: 0.28 of the memory in 16 bits, for heads of 64.

    Each vector of one token and one head gets an asymmetric grid of 16 points between its extremes. Keys are rounded
    behind the rotary embedding. docs/concepts/kv-cache.md says what is stored and what it costs.

    It comes behind the modifiers that calibrate: nothing is calibrated with rounded keys and values.

    Lifecycle:

    - check
        - size of the heads
    - run
        - mean key and value of each head, over some calibration windows
        - let the blocks round, and declare it for the checkpoint

    Attributes:
        bits: 4.
        clip_ratio: share of the span of a vector that its grid covers.
        hadamard: True to transform each vector before it is rounded, and back when it is read: outlying coordinates
            spread over all, for some time in each step.
        sink_tokens: first tokens of a sequence whose keys and values stay as they are: most attention goes to the first
            one. Not where attention slides; in a padded batch, padding takes their place.
        center: True to take each head's mean key and value off before rounding, and to put them back when read.
    """

    recipe_role: ClassVar[str | None] = "quantize_cache"
    ignored_by_default: ClassVar[tuple[str, ...]] = ()

    bits: Literal[4] = 4
    clip_ratio: ClipRatio = 0.9
    hadamard: bool = True
    sink_tokens: int = Field(default=1, ge=0)
    center: bool = True

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Refuses a second one.

        Raises:
            ValueError: if there is one.
        """
        if any(isinstance(other, KVCacheQuant) for other in others):
            raise ValueError("the recipe has another KVCacheQuant; keep one of them")

    def check(self, decoder: Decoder) -> None:
        """Checks the size of the heads.

        Raises:
            ValueError: if it is odd.
        """
        size = decoder.geometry.head_dim
        if size % 2:
            raise ValueError(
                f"KVCacheQuant packs two coordinates into a byte, and the heads have {size}; leave it out of the recipe"
            )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Lets the blocks round keys and values."""
        means = cache_means(decoder, batches()[:_WINDOWS]) if self.center else None
        form = KVCacheFormat(self.clip_ratio, self.hadamard, self.sink_tokens)
        install_kv_cache([block.module for block in decoder.blocks], decoder.model.config, form, means)
        self.contribute(decoder, sections={NAME: KVCacheSection.section(form, self.center)})
        logger.info("KVCacheQuant: keys and values in %d bits, clip ratio %g", self.bits, self.clip_ratio)
