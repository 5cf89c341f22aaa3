"""jpeft's outside world: Hugging Face and torch formats, reference models in Flax, the command line."""

from jpeft_interop.adapter_folders import load_adapters as load_adapters
from jpeft_interop.adapter_folders import save_adapters as save_adapters
from jpeft_interop.export_model import export_model as export_model
from jpeft_interop.generate import generate as generate
from jpeft_interop.infer import infer_layout as infer_layout
from jpeft_interop.layout import Layout as Layout
from jpeft_interop.layout import Place as Place
from jpeft_interop.layout import load_layout as load_layout
from jpeft_interop.layout import save_layout as save_layout
from jpeft_interop.load_model import load_model as load_model
from jpeft_interop.load_peft import load_peft as load_peft
from jpeft_interop.load_xlora import load_peft_xlora as load_peft_xlora
from jpeft_interop.provenance import Provenance as Provenance
from jpeft_interop.provenance import provenance as provenance
from jpeft_interop.ready import ready_layout as ready_layout
from jpeft_interop.ready import ready_names as ready_names
from jpeft_interop.save_model import save_model as save_model
from jpeft_interop.save_peft import save_peft as save_peft
from jpeft_interop.torch_params import params_from_torch as params_from_torch
from jpeft_interop.torch_params import params_to_torch as params_to_torch
