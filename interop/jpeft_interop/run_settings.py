"""How a run is done."""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.errors import JpeftError
from jpeft.spec import Spec
from jpeft_interop import data
from jpeft_interop.base import TASKS

RATES = {"lora": 5e-4, "dora": 5e-4, "adalora": 2e-3, "ia3": 5e-3}  # the highest learning rate, if none is given


class SettingsError(JpeftError):
    """A setting of a run that means nothing."""


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
      spec: the adapter. An AdaLoRA without `total_steps` gets a schedule for the run; an IA³ of `all-linear` gets the
        targets that are usual for the model.
      task: `causal-lm` or `classification`.
      lr: the highest learning rate; `RATES` by method if None.
      warmup: the share of the steps in which it rises.
      weight_decay: of AdamW, on the adapter.
      clip: the norm that gradients are clipped to.
      steps: how many; if None, as many as `epochs` take.
      epochs: passes over the data.
      batch_size: rows a step.
      accumulate: parts that a batch is split into, to save memory.
      seq_len: tokens a row.
      holdout: the share of examples held out.
      seed: of everything drawn.
      save_every: steps between snapshots.
      dtype: of the base's params; the weights' own if None.
      whole_txt: a .txt file is one document.
      train_on: what is learnt of a conversation: what the `assistant` says, or `all` of it.
      remat: save memory by computing again.
    """

    spec: Spec
    task: str = "causal-lm"
    lr: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    seq_len: int = 256
    holdout: float = 0.1
    seed: int = 0
    save_every: int = 50
    dtype: str | None = None
    whole_txt: bool = False
    train_on: str = data.ASSISTANT
    remat: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SettingsError(f"task must be one of {', '.join(TASKS)}; found {self.task!r}")
        if self.train_on not in data.TRAIN_ON:
            raise SettingsError(f"train_on must be one of {', '.join(data.TRAIN_ON)}; found {self.train_on!r}")
        if self.lr is None:
            object.__setattr__(self, "lr", RATES[self.spec.method])
        for name in ("lr", "clip", "epochs", "batch_size", "accumulate", "save_every"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0; found {getattr(self, name)!r}")
        if self.batch_size % self.accumulate:
            raise SettingsError(f"a batch of {self.batch_size} rows can't be split into {self.accumulate} equal parts")
