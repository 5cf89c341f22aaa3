"""Parameter-efficient fine-tuning for JAX: adapters are pytrees, applied to a model by a function of its params."""

from importlib import metadata as _metadata

from jpeft import algebra as algebra
from jpeft import initialize as initialize
from jpeft import testing as testing
from jpeft import xlora as xlora
from jpeft.adalora import adalora as adalora
from jpeft.adalora import prune as prune
from jpeft.adalora import ranks as ranks
from jpeft.adapter import Adapter as Adapter
from jpeft.adapter import Count as Count
from jpeft.adapter import count as count
from jpeft.adapter import init as init
from jpeft.apply import apply as apply
from jpeft.apply import merge as merge
from jpeft.attach import attach as attach
from jpeft.coverage import coverage as coverage
from jpeft.errors import AdapterError as AdapterError
from jpeft.errors import JpeftError as JpeftError
from jpeft.errors import KernelError as KernelError
from jpeft.errors import LiftError as LiftError
from jpeft.errors import MergeError as MergeError
from jpeft.errors import ShardingError as ShardingError
from jpeft.errors import SpecError as SpecError
from jpeft.errors import WeightsError as WeightsError
from jpeft.gates import rows as rows
from jpeft.geometry import kernels as kernels
from jpeft.kernel import Kernel as Kernel
from jpeft.kernel import Kernels as Kernels
from jpeft.lift import lift as lift
from jpeft.methods.adalora import AdaLoRA as AdaLoRA
from jpeft.methods.dora import DoRA as DoRA
from jpeft.methods.ia3 import IA3 as IA3
from jpeft.methods.lora import LoRA as LoRA
from jpeft.optimizers import lora_fa as lora_fa
from jpeft.optimizers import lora_plus as lora_plus
from jpeft.penalty import penalty as penalty
from jpeft.remat import adapted_saveable as adapted_saveable
from jpeft.save import load as load
from jpeft.save import save as save
from jpeft.shardings import optimizer_shardings as optimizer_shardings
from jpeft.shardings import shardings as shardings
from jpeft.stacked import stack as stack

try:
    __version__ = _metadata.version("jpeft")
except _metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
