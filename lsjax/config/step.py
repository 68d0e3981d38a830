"""One training step: layer dropout, the early-exit loss, adapters and the optimizer."""

from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, bounded, check
from lsjax.config.llama import LlamaConfig

AttentionKernel = Literal["auto", "xla", "splash", "flash", "cudnn"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
LoraTarget = Literal["qkv", "out", "gate_up", "down"]


@dataclass(frozen=True, kw_only=True)
class LayerDropoutConfig(Checked, prefix="layer_dropout."):
    """Rate at which layer l is skipped at step t: p(l, t) = S(t) D(l) p_max (LayerSkip, eq. 2).

    LayerSkip: the defaults with a p_max; from scratch also schedule "exponential". LayerDrop (Fan
    et al., 2020): distribution "uniform", skip "batch". PLD (Zhang and He, 2020): distribution
    "linear", schedule "saturating", p_max = 1 - its keep rate, skip "batch", rescale. "Don't Drop
    Dropout" (Elhoushi et al., 2026): distribution "linear", schedule "decreasing", rescale.
    """

    p_max: float = bounded(0.0, low=0, high=1)
    """Rate of the layer that is skipped most often; 0 turns layer dropout off."""
    distribution: Literal["exponential", "linear", "uniform"] = "exponential"
    """D(l): 2^(l / (L-1)) - 1 (eq. 3), l / (L-1), or 1."""
    layers: tuple[int, ...] | None = None
    """Layers 0..L-1 that may be skipped; all of them by default."""
    schedule: Literal["constant", "exponential", "decreasing", "saturating"] = "constant"
    """S(t): 1, 2^(t / (T-1)) - 1 (eq. 4), 1 - t / (T-1), or 1 - exp(-gamma t)."""
    gamma: float | None = bounded(None, above=0)
    """Speed of the saturating schedule, per step; 100 / T by default, as in PLD."""
    rescale: bool = False
    """Whether the output of a kept layer is divided by 1 - p; the paper does not divide it."""
    skip: Literal["mask", "gather", "batch"] = "mask"
    """How a layer is skipped. mask: by each sequence on its own, as in the paper; it is computed,
    and its effect dropped. gather: by each sequence; only those that keep it compute it, and their
    number is one of a few fixed ones. batch: by all at once."""

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError where `layers` names one that a model of L layers does not have."""
        for layer in self.layers or ():
            check(
                0 <= layer < num_layers,
                f"layer_dropout.layers has {layer}, but the layers are 0..{num_layers - 1}",
            )


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(Checked, prefix="early_exit."):
    """The early-exit loss (LayerSkip, eq. 5 and 6). Exits are numbered 1..L as in decoding; exit L
    is the model's normal output and always in the loss.

    LITE (Varshney et al., 2023): weights "uniform", curriculum "all" or "subset".
    """

    curriculum: Literal["none", "rotational", "gradual", "all", "subset"] = "none"
    """Exits in the loss beside exit L. rotational: every R-th, another set each step. gradual: one
    more every T / (2L) steps, from the last down to the first. subset: those of `exits`."""
    rotation: int = bounded(8, low=1)
    """R of the rotational curriculum."""
    exits: tuple[int, ...] = ()
    """Exits of the subset curriculum."""
    weights: Literal["paper", "uniform", "custom"] = "paper"
    """Weights before they are normalised over the active exits. paper: e(l) of eq. 6. uniform: 1.
    custom: `custom_weights`."""
    e_scale: float = bounded(1.0, low=0, high=1)
    """Weight of the intermediate exits in the paper's e(l), from 0 to 1."""
    custom_weights: tuple[float, ...] = bounded((), low=0)
    """A weight for each exit 1..L."""
    token_share: float = bounded(1.0, above=0, high=1)
    """Share of the labelled tokens that an intermediate exit is trained on. It is drawn anew for
    each exit and step; the loss stays the same on average."""
    target: Literal["labels", "final"] = "labels"
    """What an intermediate exit learns: the next token, or the distribution that exit L gives."""

    def __post_init__(self):
        super().__post_init__()
        check(
            (self.curriculum == "subset") == bool(self.exits),
            f"early_exit.exits {self.exits} belongs to the subset curriculum: give both or neither",
        )
        check(
            (self.weights == "custom") == bool(self.custom_weights),
            f"early_exit.custom_weights {self.custom_weights} belongs to weights custom: give both "
            "or neither",
        )
        check(
            not self.custom_weights or self.custom_weights[-1] > 0,
            f"early_exit.custom_weights {self.custom_weights} must end above 0, as exit L is "
            "always in the loss",
        )

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError where exits or weights do not belong to a model of L layers."""
        for exit in self.exits:
            check(
                1 <= exit <= num_layers,
                f"early_exit.exits has {exit}, but the exits are 1..{num_layers}",
            )
        check(
            len(self.custom_weights) in (0, num_layers),
            f"early_exit.custom_weights has {len(self.custom_weights)} weights, but there are "
            f"{num_layers} exits",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, prefix="optimizer."):
    """AdamW (Loshchilov and Hutter, 2019). The paper gives learning rates only; the other
    defaults are the usual ones for Llamas."""

    learning_rate: float = bounded(3e-4, low=0)
    """Highest learning rate, reached after warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_steps: int = bounded(0, low=0)
    """Steps in which the learning rate rises from 0."""
    final_share: float = bounded(0.1, low=0, high=1)
    """Share of the learning rate that is left at the end; read by cosine and linear."""
    b1: float = bounded(0.9, low=0, below=1)
    """Decay of the mean of the gradients."""
    b2: float = bounded(0.95, low=0, below=1)
    """Decay of the mean of their squares."""
    eps: float = bounded(1e-8, above=0)
    """Added to the root of the mean of the squares."""
    weight_decay: float = bounded(0.1, low=0)
    """Decay of matrices and tables; norms and biases do not decay."""
    clip_norm: float | None = bounded(1.0, above=0)
    """Largest norm of the gradient; a longer one is scaled down. None turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked, prefix="lora."):
    """LoRA (Hu et al., 2021): W + alpha / rank A B replaces W, and only A and B are trained.

    Queries, keys and values are one matrix, so they share an A; so do gate and up.
    """

    rank: int = bounded(0, low=0, hint="0 trains the whole model")
    """Columns of A and rows of B; 0 trains the whole model."""
    alpha: float = bounded(16.0, above=0)
    """Scale of A B, times the rank."""
    targets: tuple[LoraTarget, ...] = ("qkv", "out", "gate_up", "down")
    """Matrices of each layer that get an adapter."""

    def __post_init__(self):
        super().__post_init__()
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"lora.targets {self.targets} must name at least one matrix, and each once",
        )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class StepConfig(Checked):
    """Everything that a training step depends on, except for the model and the batch."""

    num_steps: int = bounded(low=1)
    """T: optimizer steps of the whole run; schedules and curricula are stretched over them."""
    seed: int = bounded(0, low=0, below=2**32)
    """Seed of new weights, of the rows' order, of layer dropout, and of the tokens that exits are
    trained on."""
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    z_loss: float = bounded(0.0, low=0)
    """Weight of the squared log of the softmax's denominator (PaLM, 2022: 1e-4)."""
    micro_batches: int = bounded(1, low=1)
    """Parts of a batch that run one after the other; their gradients are added."""
    remat: Literal[
        "none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"
    ] = "none"
    """Values that a layer keeps for its backward pass: all, or those of jax's checkpoint policy of
    that name. The rest is computed again. Policies that keep products also keep the output of an
    attention kernel; on GPUs it replaces the projection that follows."""
    attention: AttentionKernel = "auto"
    """Kernel of attention. auto is splash on TPUs, flash on GPUs and xla elsewhere. Where these do
    not take the arrays it is cudnn or xla (lsjax/model/attention.py)."""
    dtype: ComputeDtype = "auto"
    """Type of the computation. auto is bfloat16 on accelerators; on CPUs it is the parameters'."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.optimizer.warmup_steps <= self.num_steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than num_steps "
            f"{self.num_steps}",
        )

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError where layers or exits are named that the model does not have."""
        self.layer_dropout.check_layers(model.num_layers)
        self.early_exit.check_layers(model.num_layers)

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError where the micro-batches do not share the rows evenly."""
        check(
            batch_size % self.micro_batches == 0,
            f"micro_batches {self.micro_batches} does not divide the batch of {batch_size} rows: "
            "choose a divisor",
        )
