"""The processes that torchrun started for one run.

docs/developer/many-ranks.md has the design.
"""

from quad_modifiers.ranks.ordered_sum import OrderedSum, is_own_part, part_of
from quad_modifiers.ranks.together import RankLost, Ranks, joined, ranks

__all__ = ["OrderedSum", "RankLost", "Ranks", "is_own_part", "joined", "part_of", "ranks"]
