"""Teaches other libraries about this package as soon as they are imported, and not before.

`import quad_modifiers` must cost next to nothing, since `quad --help` runs it, and yet
`AutoModelForCausalLM.from_pretrained` must know QUAD checkpoints afterwards. So the import only leaves a hook with each
library; whatever is imported first, a hook runs when its library is complete:

    transformers     loader, model classes and kernel backends of plugins
    llmcompressor    the modifiers, and again what comes before
    peft             adapters of split linears
    lm_eval.models   the model type "quad" and the offline tasks

These hooks are the only imports of the subject that lead up to quad_peft and to the tools.
"""

import sys
from typing import Any

import wrapt


def install_hooks() -> None:
    """Leaves the hooks; one whose library is imported already runs at once."""
    wrapt.register_post_import_hook(_after_transformers, "transformers")
    wrapt.register_post_import_hook(_after_llmcompressor, "llmcompressor")
    wrapt.register_post_import_hook(_after_peft, "peft")
    wrapt.register_post_import_hook(_after_lm_eval, "lm_eval.models")


def _after_transformers(_: object) -> None:
    # llm-compressor imports transformers itself. In the middle of that, a plugin that needs llm-compressor would find
    # it half-made; its own hook follows and connects both.
    spec = getattr(sys.modules.get("llmcompressor"), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        connect()


def _after_llmcompressor(_: object) -> None:
    connect()


def _after_peft(_: object) -> None:
    from quad_peft.registration import connect_peft

    connect_peft()


def _after_lm_eval(_: object) -> None:
    from quad_modifiers.tools.evaluation.harness import register

    register()


def connect() -> None:
    """Loads the plugins and registers what they and this package bring; calling it again changes nothing."""
    from quad_modifiers.checkpoint.loader import register_loader
    from quad_modifiers.plugins.manager import plugins_are_loading

    # A plugin whose module imports llm-compressor brings us here while an earlier call loads the plugins, which cannot
    # be asked for yet. That call goes on below and finds llm-compressor imported. (It cannot be an import of
    # transformers: get_plugin_manager imports that before it starts.)
    if plugins_are_loading():
        return
    register_loader(_push_to_hub)
    _register_kernel_backends()
    if sys.modules.get("llmcompressor") is not None:
        from quad_modifiers.plugins import register_modifiers

        register_modifiers()


def _push_to_hub(model: Any, repo_id: str, **arguments: Any) -> Any:
    from quad_modifiers.tools.publishing import push_to_hub

    return push_to_hub(model, repo_id, **arguments)


def _register_kernel_backends() -> None:
    from quad_kernels.backends import register_backend_path

    from quad_modifiers.plugins import kernel_backends

    for backend in kernel_backends().values():
        register_backend_path(backend.name, backend.path, str(backend.distribution))
