"""What this distribution contributes."""

import pluggy

hookimpl = pluggy.HookimplMarker("quad_modifiers")


@hookimpl
def quad_modifiers_modifiers() -> dict[str, str]:
    return {
        "LowRankResidue": "quad_method_plugin.low_rank_residue:LowRankResidue",
        "NoteMethod": "quad_method_plugin.note_method:NoteMethod",
    }


@hookimpl
def quad_modifiers_linear_terms() -> dict[str, str]:
    return {"low_rank": "quad_method_plugin.low_rank:LowRank"}


@hookimpl
def quad_modifiers_checkpoint_sections() -> dict[str, str]:
    return {"method_note": "quad_method_plugin.method_note:MethodNote"}


@hookimpl
def quad_modifiers_kernel_backends() -> dict[str, str]:
    return {"row_pairs": "quad_method_plugin.row_pairs:RowPairsBackend"}


@hookimpl
def quad_modifiers_architectures() -> list:
    from quad_method_plugin.twin import TWIN

    return [TWIN]
