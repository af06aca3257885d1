"""`publish`: a checkpoint's way to the Hub: model card, a stranger's check of the folder, upload."""

from quad_modifiers.records.evaluation_record import Evaluation, PerplexityResult, read_evaluation
from quad_modifiers.tools.hub_errors import HubError
from quad_modifiers.tools.publishing.card import write_card
from quad_modifiers.tools.publishing.publication import Plan, Published, plan, publish
from quad_modifiers.tools.publishing.push import push_to_hub
from quad_modifiers.tools.publishing.stranger import check_as_stranger

__all__ = [
    "Evaluation",
    "HubError",
    "PerplexityResult",
    "Plan",
    "Published",
    "check_as_stranger",
    "plan",
    "publish",
    "push_to_hub",
    "read_evaluation",
    "write_card",
]
