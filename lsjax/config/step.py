"""Configuration of a training step, and of the mesh that it runs on."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from lsjax.config.adapters import ExitBlocksConfig, LoraConfig
from lsjax.config.checked import Checked, bounded, check
from lsjax.config.llama import LlamaConfig

AttentionKernel = Literal["auto", "xla", "splash", "flash", "cudnn"]
Kernels = Literal["auto", "reference"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
# "auto", or what the layers keep in training, most first. jax names three of them.
Remat = Literal[
    "auto",
    "none",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "attention",
    "attention_output",
    "nothing_saveable",
]


@dataclass(frozen=True, kw_only=True)
class LayerDropoutConfig(Checked, prefix="layer_dropout."):
    """Layer dropout. The rate of layer l at step t is p(l, t) = S(t) D(l) p_max (LayerSkip, eq. 2).

    LayerSkip: the defaults with a p_max; from scratch also schedule "exponential". LayerDrop (Fan
    et al., 2020): distribution "uniform", skip "batch". PLD (Zhang and He, 2020): distribution
    "linear", schedule "saturating", p_max = 1 - its keep rate, skip "batch", rescale. "Don't Drop
    Dropout" (Elhoushi et al., 2026): distribution "linear", schedule "decreasing", rescale.
    """

    p_max: float = bounded(0.0, low=0, high=1)
    """Rate of the layer that is skipped most often; 0 disables layer dropout."""
    distribution: Literal["exponential", "linear", "uniform"] = "exponential"
    """D(l): 2^(l / (L-1)) - 1 (eq. 3), l / (L-1), or 1."""
    layers: tuple[int, ...] | None = None
    """Layers 0..L-1 that may be skipped; all of them by default."""
    schedule: Literal["constant", "exponential", "decreasing", "saturating"] = "constant"
    """S(t): 1, 2^(t / (T-1)) - 1 (eq. 4), 1 - t / (T-1), or 1 - exp(-gamma t)."""
    gamma: float | None = bounded(None, above=0)
    """Speed of the saturating schedule, per step; 100 / T by default, as in PLD."""
    rescale: bool = False
    """Whether the output of a kept layer is divided by 1 - p; the paper does not do this."""
    skip: Literal["mask", "gather", "batch"] = "mask"
    """How a layer is skipped. mask: per sequence, as in the paper; the layer is computed, and its
    output dropped. gather: per sequence; only sequences that keep the layer compute it, and their
    count is one of a few fixed counts. batch: by all sequences at once."""

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError if `layers` names a layer that a model of L layers lacks."""
        last = num_layers - 1
        unknown = next((layer for layer in self.layers or () if not 0 <= layer <= last), None)
        check(unknown is None, f"layer_dropout.layers has {unknown}, but the layers are 0..{last}")


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(Checked, prefix="early_exit."):
    """Early-exit loss (LayerSkip, eq. 5 and 6). Exits are numbered 1..L, as in decoding. Exit L is
    the model's normal output and always in the loss.

    LITE (Varshney et al., 2023): weights "uniform", curriculum "all" or "subset".
    """

    curriculum: Literal["none", "rotational", "gradual", "all", "subset"] = "none"
    """Exits in the loss beside exit L. rotational: every R-th exit, shifted at each step. gradual:
    one more every T / (2L) steps, from the last to the first. subset: those of `exits`."""
    rotation: int = bounded(8, low=1)
    """R of the rotational curriculum."""
    exits: tuple[int, ...] = ()
    """Exits of the subset curriculum."""
    weights: Literal["paper", "uniform", "custom"] = "paper"
    """Weights before normalisation over the enabled exits. paper: the paper's e(l). uniform: 1.
    custom: `custom_weights`."""
    e_scale: float = bounded(1.0, low=0, high=1)
    """Weight of the intermediate exits in the paper's e(l), from 0 to 1."""
    custom_weights: tuple[float, ...] = bounded((), low=0)
    """A weight for each exit 1..L."""
    token_share: float = bounded(1.0, above=0, high=1)
    """Share of the labelled tokens that an intermediate exit trains on, sampled for each exit and
    step. The loss stays the same on average."""
    target: Literal["labels", "final"] = "labels"
    """Target of the intermediate exits: the next token, or the output distribution of exit L."""

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
        """Raises ConfigError if exits or weights do not belong to a model of L layers."""
        unknown = next((exit for exit in self.exits if not 1 <= exit <= num_layers), None)
        check(unknown is None, f"early_exit.exits has {unknown}, but the exits are 1..{num_layers}")
        given = len(self.custom_weights)
        check(
            given in (0, num_layers),
            f"early_exit.custom_weights has {given} weights, but there are {num_layers} exits",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, prefix="optimizer."):
    """AdamW (Loshchilov and Hutter, 2019). The LayerSkip paper gives learning rates only. The other
    defaults are common for Llamas."""

    learning_rate: float = bounded(3e-4, low=0)
    """Highest learning rate, reached after warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Decay of the learning rate after warm-up."""
    warmup_steps: int = bounded(0, low=0)
    """Steps in which the learning rate rises from 0. A shorter run ends before it is highest."""
    final_share: float = bounded(0.1, low=0, high=1)
    """Final learning rate, as a share of the highest; read by cosine and linear."""
    b1: float = bounded(0.9, low=0, below=1)
    """Decay of the mean of the gradients."""
    b2: float = bounded(0.95, low=0, below=1)
    """Decay of the mean of the squared gradients."""
    eps: float = bounded(1e-8, above=0)
    """Added to the root of the mean squared gradient."""
    weight_decay: float = bounded(0.1, low=0)
    """Weight decay of matrices and tables; norms and biases do not decay."""
    clip_norm: float | None = bounded(1.0, above=0)
    """Largest norm of the gradient; larger gradients are scaled down. None disables clipping."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked, prefix="mesh."):
    """Sizes of the mesh's axes, by default of one device. One of them may be -1, which takes the
    remaining devices. lsjax/sharding.py explains how each axis shards the arrays."""

    data: int = 1
    """Devices over which the rows of a batch are sharded."""
    fsdp: int = 1
    """Devices over which weights are sharded along D; in training the rows too."""
    context: int = 1
    """Devices over which the positions of a row are sharded, in training only."""
    tensor: int = 1
    """Devices over which heads, feed-forward channels and vocabulary are sharded."""
    slices: int = bounded(1, low=1)
    """Slices of a TPU pod, joined by the data center's network. The other sizes are those of one
    slice, and the rows are sharded over all slices."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on a machine of that many devices; devices beyond the mesh stay idle.

        The data axis covers all slices. Raises ConfigError if the sizes do not fit the devices.
        """
        sizes = asdict(self)
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        slices = sizes.pop("slices")
        for name, size in sizes.items():
            check(
                size == -1 or size >= 1,
                f"mesh.{name} {size} is not a size: choose 1 or more, or -1 for all the rest",
            )
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) <= 1, f"mesh.{' and mesh.'.join(rest)} are -1: use -1 for only one of them")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        of_slice, over = divmod(num_devices, slices)
        several = "a multiple of " if rest or slices > 1 else ""
        check(
            over == 0 and (of_slice % fixed == 0 if rest else fixed <= of_slice),
            f"a mesh of {asked} needs {several}{fixed * slices} devices, but there are "
            f"{num_devices}: choose --mesh sizes that fit",
        )
        sizes |= dict.fromkeys(rest, of_slice // fixed)
        return sizes | {"data": sizes["data"] * slices}

    def check_decoding(self) -> None:
        """Raises ConfigError if this is a mesh for training only."""
        for name in ("slices", "context"):
            size = getattr(self, name)
            check(size == 1, f"mesh.{name} {size} is for training: decode without the flag")


@dataclass(frozen=True, kw_only=True)
class StepConfig(Checked):
    """Configuration of a training step, without the model and the batch."""

    num_steps: int = bounded(low=1)
    """T: optimizer steps of the whole run; schedules and curricula are stretched over them."""
    seed: int = bounded(0, low=0, below=2**32)
    """Seed of new weights, the order of rows, layer dropout, and the tokens that exits train on."""
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    exit_blocks: ExitBlocksConfig = ExitBlocksConfig()
    z_loss: float = bounded(0.0, low=0)
    """Weight of the squared log of the softmax's denominator (PaLM, 2022: 1e-4)."""
    micro_batches: int = bounded(1, low=1)
    """Number of sequential parts of a batch; their gradients are added."""
    remat: Remat = "none"
    """Values that a layer keeps for its backward pass; it recomputes the others. none keeps all.
    dots policies keep matmuls, and attention is one. attention keeps its queries, keys, values and
    output, and the state that follows; attention_output only the last two. nothing_saveable keeps
    the layer's input. auto compiles the step with all but dots_saveable, and takes the fastest
    that fits."""
    attention: AttentionKernel = "auto"
    """Attention kernel. auto is splash on TPUs, flash on GPUs and xla elsewhere. If these do not
    support the arrays, it is cudnn or xla (lsjax/kernels/self_attention.py)."""
    kernels: Kernels = "auto"
    """Tuned code. auto uses what is tuned for the platform: attention kernels, padded rows, split
    matrices, barriers and chosen layouts. reference uses none of it (docs/performance.md)."""
    dtype: ComputeDtype = "auto"
    """Dtype of the computation. auto is bfloat16 on accelerators, the parameters' dtype on CPUs."""

    def __post_init__(self):
        super().__post_init__()
        check(
            "auto" in (self.attention, self.kernels),
            f'attention "{self.attention}" needs kernels "auto": drop one of the two',
        )
        if self.exit_blocks.exits:
            plain = {
                "layer_dropout": LayerDropoutConfig(),
                "early_exit": EarlyExitConfig(),
                "lora": LoraConfig(),
                "z_loss": 0.0,
            }
            changed = [name for name, value in plain.items() if getattr(self, name) != value]
            check(
                not changed,
                f"{', '.join(changed)} would change the model, which exit blocks leave as it is: "
                "drop exit_blocks.exits, or what changes the model",
            )

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError if the config names layers or exits that the model lacks."""
        self.layer_dropout.check_layers(model.num_layers)
        self.early_exit.check_layers(model.num_layers)
        self.exit_blocks.check_layers(model.num_layers, model.vocab_size)

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError if the number of micro-batches does not divide the rows."""
        check(
            batch_size % self.micro_batches == 0,
            f"micro_batches {self.micro_batches} does not divide the batch of {batch_size} rows: "
            "choose a divisor",
        )
