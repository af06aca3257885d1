"""What is finished of a long run, durable on disk, so that whatever ends the run does not lose it.

docs/developer/interrupted-runs.md has the design.
"""

from quad_modifiers.journal.digest import digest_of
from quad_modifiers.journal.journal import Journal, folder_in_journal, journaled, open_step
from quad_modifiers.journal.saving import note_saving, remove_journal, settle_saving
from quad_modifiers.journal.shared_step import SharedStep
from quad_modifiers.journal.step import Step
from quad_modifiers.journal.unfinished import check_absent, identity_of, open_unfinished, unfinished_folder

__all__ = [
    "Journal",
    "SharedStep",
    "Step",
    "check_absent",
    "digest_of",
    "folder_in_journal",
    "identity_of",
    "journaled",
    "note_saving",
    "open_step",
    "open_unfinished",
    "remove_journal",
    "settle_saving",
    "unfinished_folder",
]
