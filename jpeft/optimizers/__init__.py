"""Optimisers for low-rank factors, as optax transformations of `adapter.trained`."""

from jpeft.optimizers.lora_fa import lora_fa as lora_fa
from jpeft.optimizers.lora_plus import lora_plus as lora_plus
