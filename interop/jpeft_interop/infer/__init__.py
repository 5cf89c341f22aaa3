"""The layout of params found from their weights in both forms; `infer_layout` is the one entry."""

from jpeft_interop.infer.infer_layout import infer_layout as infer_layout
