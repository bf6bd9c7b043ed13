"""Language models that give no attention, or another one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flallm_ds.inference.translator import Translator

NAMES = ("attentions", "cross_attentions")


@contextmanager
def changed_attention(
    translator: Translator, change: Callable[[Any], Any]
) -> Iterator[None]:
    """Let the language model of a translator return other attention weights.

    change: maps the weights of a layer to those that are returned; called only where the
    model was asked for its attention.
    """

    def hook(module: Any, args: Any, out: Any) -> Any:
        for name in NAMES:
            if out.get(name) is not None:
                out[name] = tuple(map(change, out[name]))
        return out

    handle = translator.export.translator.language_model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def no_attention(translator: Translator) -> Any:
    """Let the language model return None for each layer, as some implementations do."""
    return changed_attention(translator, lambda layer: None)
