"""Ways for a LoRA to start: each a pure function from a new adapter to one that begins somewhere better than at random.

`orthogonal` and `eva` leave the base alone and return an adapter. The others take the adapter's start out of the base
and return both, `Initialized(adapter, params)`; `on_original_base` makes an ordinary LoRA of the result, for the base as
it was. (`kaiming` and `gaussian` are `jpeft.LoRA(init=...)`.)
"""

from jpeft.initialize.factors import Initialized as Initialized
from jpeft.initialize.olora import olora as olora
from jpeft.initialize.original_base import on_original_base as on_original_base
from jpeft.initialize.orthogonal import orthogonal as orthogonal
from jpeft.initialize.pissa import pissa as pissa
