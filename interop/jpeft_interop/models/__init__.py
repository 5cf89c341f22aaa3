"""Reference models in Flax NNX, with Hugging Face's module names. Plain models: they know nothing of adapters."""

from jpeft_interop.models.building import build as build
from jpeft_interop.models.cache import Cache as Cache
from jpeft_interop.models.cache import init_cache as init_cache
from jpeft_interop.models.errors import ModelError as ModelError
from jpeft_interop.models.families import FAMILIES as FAMILIES
from jpeft_interop.models.families import Family as Family
from jpeft_interop.models.families import family as family
from jpeft_interop.models.output import Output as Output
from jpeft_interop.models.pure import pure as pure
