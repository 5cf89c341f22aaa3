"""X-LoRA: LoRA experts mixed token by token (Buehler & Buehler 2024, arXiv:2402.07148).

    mixture = jpeft.xlora.init(key, jpeft.xlora.XLoRA(depth=2), {"code": a, "prose": b}, features=576)
    run = jpeft.xlora.lift(forward)
    output, scalings = run(params, mixture, input_ids)

`forward` is a plain function whose result has the last hidden state. Experts may adapt different weights, and have any
names. Train `mixture.trained`, put it back with `mixture.replace(trained=...)`.
"""

from jpeft.xlora.change import add as add
from jpeft.xlora.change import select as select
from jpeft.xlora.mixture import Layer as Layer
from jpeft.xlora.mixture import Mixture as Mixture
from jpeft.xlora.mixture import init as init
from jpeft.xlora.mixture import layers_of as layers_of
from jpeft.xlora.routing import lift as lift
from jpeft.xlora.routing import scalings as scalings
from jpeft.xlora.save import load as load
from jpeft.xlora.save import save as save
from jpeft.xlora.spec import XLoRA as XLoRA
