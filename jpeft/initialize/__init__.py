"""Ways for a LoRA to start: each a pure function from a new adapter to one that begins somewhere better than at random.

`orthogonal` and `eva` leave the base alone and return an adapter. The others take the adapter's start out of the base
and return both, `Initialized(adapter, params)`; `on_original_base` makes an ordinary LoRA of the result, for the base
as it was. (`kaiming` and `gaussian` are `jpeft.LoRA(init=...)`.)
"""

from jpeft.initialize.corda import corda as corda
from jpeft.initialize.corda import covariance as covariance
from jpeft.initialize.eva import eva as eva
from jpeft.initialize.factors import Initialized as Initialized
from jpeft.initialize.loftq import loftq as loftq
from jpeft.initialize.lora_ga import lora_ga as lora_ga
from jpeft.initialize.lora_ga import weight_gradients as weight_gradients
from jpeft.initialize.olora import olora as olora
from jpeft.initialize.original_base import on_original_base as on_original_base
from jpeft.initialize.orthogonal import orthogonal as orthogonal
from jpeft.initialize.pissa import pissa as pissa
from jpeft.initialize.tap import Stream as Stream
from jpeft.initialize.tap import moments as moments
from jpeft.initialize.tap import scaled_gram as scaled_gram
from jpeft.initialize.tap import tap as tap
from jpeft.initialize.tap import total as total
