"""Where the leaves of params lie in torch: the notation, a leaf's place, the whole layout."""

from jpeft_interop.layout.default import default_layout as default_layout
from jpeft_interop.layout.layout import Layout as Layout
from jpeft_interop.layout.layout import find as find
from jpeft_interop.layout.layout_file import load_layout as load_layout
from jpeft_interop.layout.layout_file import save_layout as save_layout
from jpeft_interop.layout.link import Kind as Kind
from jpeft_interop.layout.link import Link as Link
from jpeft_interop.layout.place import Place as Place
from jpeft_interop.layout.place import Tensor as Tensor
