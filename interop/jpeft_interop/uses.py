"""Whether an adapter of an embedding is one of the output head, too: a tie that nobody told is refused, not guessed."""

from __future__ import annotations

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError
from jpeft_interop.layout import Layout


def check_uses(adapter: Adapter, layout: Layout) -> None:
    """Raise AdapterError where an embedding is adapted that may be the output head, too, and the layout has no tie.

    PEFT adapts a lookup alone where a head is not named. Params hold a tied weight once, so that here the same adapter
    would act on the head, too.

    Args:
      adapter: for a base or from a file.
      layout: made from the params' paths alone, which name no head that has no leaf.
    """
    if not _may_hide_head(layout):
        return
    for site in adapter.sites:
        if site.use is None and _is_inner_embedding(site.path, layout):
            raise AdapterError(
                f"{site.path!r} is adapted, and it can't be told whether the model has it for its output head, too: "
                "all leaves lie in one module, and no head has one of its own. Say so with the torch module: "
                "layout=infer_layout(params, module)"
            )


def _may_hide_head(layout: Layout) -> bool:
    """Whether all leaves lie in one module and none is tied: what the model has beside it, a head, has no leaf."""
    tops = {path.partition("/")[0] for path in layout}
    return len(tops) == 1 and all(len(links) == 1 for links in layout.links.values())


def _is_inner_embedding(path: str, layout: Layout) -> bool:
    return path in layout and layout.links[path][0].kind == "embedding" and "/" in path.partition("/")[2]
