"""The configuration of a run: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Preset = Literal["world", "world-conflict", "demo", "tiny", "sd35m", "sd35m-single-gpu"]
# The switches that each named rule takes; rules of the user's own take those of OWN_RULE.
BUILT_IN_RULES: dict[str, tuple[str, ...]] = {
    "soft-gdpo": ("strength", "keep", "prior"),
    "soft-min": ("strength", "keep", "prior"),
    "marble": ("refresh_every", "rho", "guard"),
    "marble-paper": ("refresh_every", "rho"),
    "catch-up": ("refresh_every", "decay", "prior", "ahead"),
    "noise-aware": ("refresh_every", "decay", "prior"),
    "cone": ("refresh_every", "decay", "prior"),
    "upgrad": ("refresh_every", "prior"),
    "weighted-sum": (),
    "uniform": (),
    "gdpo": (),
}
OWN_RULE = ("refresh_every", "rho", "decay")
REWARDS: tuple[str, ...] = (
    "pickscore",
    "hpsv2",
    "clipscore",
    "ocr",
    "geneval",
    "aesthetic",
    "imagereward",
    "unifiedreward",
)  # those of real models, a file each in reference/rewards/
WORLD_SOURCES = ("world", "world:text", "world:objects")  # of generated prompts: all, with a text, without
WORLD_REWARDS = ("objects", "objects_strict", "text", "similarity", "colour", "jpeg", "sharpness", "contrast")


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter trained on it."""

    base: str = "world"
    """"world" for the small model that ships with the code, or a folder with the same layout; for Stable Diffusion 3,
    an id on the Hugging Face hub or the folder of a pipeline."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: Literal["linear", "attention"] = "linear"
    """Layers that get an adapter: every linear layer of the blocks, or the attention projections (the paper's)."""
    compile: bool = False
    """torch.compile of the blocks: minutes at the start, faster steps after. Batches that all have the same size
    compile once; refreshes have graphs of their own, for any K."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: the frozen base in bfloat16 and autocast around the model; the adapter and all losses stay float32."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again on the way back: less memory, about a third more time a step."""
    shard: bool = False
    """Each of several processes keeps a share of the frozen base and gathers a block when it runs (FSDP2): less memory,
    more communication. Alone, nothing changes."""
    resolution: int = 512
    """Side of the images in pixels; the small world has its own."""
    t5_tokens: int = 256
    """Tokens of a prompt that the T5 encoder sees, the pipeline's max_sequence_length."""
    cache: Path = Path("runs/cache")
    """Folder of the prompt embeddings of Stable Diffusion 3, computed once and used by all runs."""


@dataclass(frozen=True)
class RolloutConfig:
    """Prompts, and how images are sampled from the old policy."""

    prompts: tuple[str, ...] = ("world",)
    """Sources of training prompts: "world" for generated ones, "world:text" and "world:objects" for those with a text
    and without, or files as [format:]path[#reward,reward] with format text, ocr or geneval, and the rewards that
    apply."""
    weights: tuple[float, ...] = ()
    """Share of each source in an epoch, relative to the others; empty for equal shares."""
    held_out: tuple[str, ...] = ()
    """Sources of held-out prompts, taken in turn; the small world generates its own."""
    pool: int = 64
    """Number of generated training prompts; ignored for files."""
    prompts_per_epoch: int = 20
    """Prompts drawn for each epoch, a group of images for each."""
    images_per_prompt: int = 24
    """Images of a group; advantages are relative to their mean."""
    steps: int = 8
    """Sampling steps."""
    sampler: Literal["euler", "dpm2"] = "euler"
    """Deterministic solver: Euler, or DPM-Solver of order 2 (the paper's)."""
    batch: int = 72
    """Images sampled at a time; memory only, results do not depend on it beyond rounding."""


@dataclass(frozen=True)
class ScoringConfig:
    """Where and how rewards are computed."""

    device: str = "auto"
    """Device of the rewards: auto for that of the run, or cpu, cuda, cuda:1, ..."""
    batch: int = 0
    """Images given to a reward at a time; 0 for all of an epoch."""
    background: bool = False
    """Score in a thread of its own while the next images are sampled. The scores are the same; needs batch."""
    timeout: float = 0.0
    """Seconds that a reward may take for a batch of images, then the run stops and says which; 0 for no limit."""
    models: tuple[str, ...] = ()
    """Where rewards load their models from, as name=source: a folder, a hub id or a server's URL."""


@dataclass(frozen=True)
class LossConfig:
    """The NFT loss and its advantages."""

    form: Literal["x0", "velocity"] = "x0"
    """DiffusionNFT's adaptive x0 loss, or the plain velocity loss."""
    beta: float = 0.1
    """Strength of the positive and negative branch."""
    a_max: float = 5.0
    """Advantages are clamped here."""
    kl_weight: float = 0.1
    """Weight of the pull to the base model, outside the balancing; above 0 it costs one more forward pass. At 0 the
    small world's training comes apart after some 60 epochs."""
    norm_guard: float = 0.0
    """Weight of a hinge on the length of the velocity, which acts only where it is longer than the base model's
    (NormGuard); outside the balancing, above 0 it costs the same forward pass."""
    std: Literal["global", "group"] = "global"
    """Standard deviation that divides advantages: over the epoch's images, or within each prompt's group."""
    timesteps_per_image: int = 3
    """How many of the sampler's timesteps each image is trained on; 0 for all of timestep_fraction."""
    timestep_fraction: float = 0.99
    """Share of the sampler's timesteps, from noise on, that are trained on: 0.99 leaves out the last, almost clean."""


@dataclass(frozen=True)
class SolveConfig:
    """Numbers of the balancing rule. What is not given is what the rule says; what a rule does not take it refuses."""

    refresh_every: int | None = None
    """Optimiser steps from one solve to the next, the paper's N."""
    rho: float | None = None
    """Weight of the smoothed weights at a solve; 0 turns smoothing off."""
    guard: float | None = None
    """Share of the best smallest cosine, in [0, 1), that smoothing must leave; 0 for the plain average."""
    decay: float | None = None
    """Memory of the gradients' moments, from which a rule estimates the signals; 0 for none."""
    prior: tuple[float, ...] | None = None
    """Weights of the rewards' advantages before any balancing; equal ones without it."""
    strength: float | None = None
    """Strength with which soft-gdpo and soft-min favour rewards that lag; 0 for constant weights."""
    keep: float | None = None
    """Share of the weights that soft-gdpo and soft-min leave as the prior has them."""
    ahead: float | None = None
    """Standard deviations that a reward may be in front of the last one before catch-up leaves it to itself."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and the two moving averages of the adapter."""

    lr: float = 5e-4
    """Learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 0.05
    """Gradients are scaled down to this norm; those of the small world are about 0.04 long (the paper: 1)."""
    steps_per_epoch: int = 2
    """Optimiser steps an epoch, each on its share of the images."""
    micro_batch: int = 54
    """Rows (an image at a timestep) of one forward and backward pass; gradients accumulate over them."""
    old_decay: Literal["standard", "slow"] = "standard"
    """Schedule by which the sampling policy follows: decay min(0.001 step, 0.5), or the paper's for OCR."""
    ema_cap: float = 0.9
    """Largest decay of the weights kept for evaluation."""


@dataclass(frozen=True)
class LogConfig:
    """Evaluation, checkpoints and trackers."""

    eval_every: int = 10
    """Epochs between evaluations on held-out prompts; 0 for the first and last only."""
    eval_prompts: int = 60
    """Held-out prompts, the same ones at every evaluation."""
    eval_images: int = 4
    """Images of each of them, from the same noise at every evaluation."""
    eval_steps: int = 10
    """Sampling steps of evaluation images."""
    save_every: int = 10
    """Epochs between checkpoints; the last two are kept."""
    measure_every: int = 100
    """Optimiser steps between measurements of all gradients with a rule that does not need them; 0 for none. A rule
    that solves measures whenever it does."""
    watch: tuple[str, ...] = ("objects_strict",)
    """Rewards that evaluations report beside the trained ones: held-out rewards."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate: tensorboard, wandb, comet_ml, mlflow, ...; none with an empty list."""


@dataclass(frozen=True)
class Config:
    """A training run. Each field has a flag; values come from the preset, then the file, then the command line."""

    run: Path = Path("runs/world")
    """Folder of the run: config, metrics, checkpoints, images, report."""
    balance: str = "soft-gdpo"
    """soft-gdpo, soft-min, catch-up, marble, marble-paper, noise-aware, cone, upgrad, weighted-sum, uniform, gdpo, or
    module:callable, yours."""
    rewards: tuple[str, ...] = ("objects", "text", "similarity", "colour", "jpeg")
    """Rewards to raise: names of the world's eight or of reference/rewards/, or module:callable of your own."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the raw rewards for weighted-sum; empty for 1 each."""
    epochs: int = 80
    """Epochs: sample, score, train, follow."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """Device of the model: auto for a GPU where there is one, or cpu, cuda, cuda:1, ..."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    solve: SolveConfig = field(default_factory=SolveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class PretrainConfig:
    """How the world's base model is made: rectified flow on rendered scenes."""

    steps: int = 3000
    """Optimiser steps."""
    batch: int = 64
    """Scenes a step."""
    lr: float = 2e-3
    """Learning rate, of Muon for the matrices inside the blocks and of AdamW for all else."""
    warmup: int = 100
    """Steps of linear warm-up, 0 for none; then the rate is constant, and the averaged weights are what is kept."""
    ink_weight: float = 1.0
    """Weight in the loss of the pixels that text inks."""
    seed: int = 0
    """Seed of weights, scenes, noise and times."""
    save_every: int = 500
    """Steps between saved states."""


@dataclass(frozen=True)
class SimilarityConfig:
    """How the world's dual encoder is trained: contrastively, on rendered scenes with a little noise."""

    steps: int = 1500
    """Optimiser steps."""
    batch: int = 256
    """Scenes a step, with distinct prompts."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of weights, scenes and noise."""


def is_world(base: str) -> bool:
    """Whether a base model is the small world, or a folder with its layout; others are Stable Diffusion 3 pipelines.

    Example:
        >>> is_world("world"), is_world("stabilityai/stable-diffusion-3.5-medium")
        (True, False)
    """
    return base == "world" or (Path(base).is_dir() and not (Path(base) / "model_index.json").is_file())


def training_times(config: Config) -> int:
    """How many of the sampler's timesteps, from noise on, are trained on.

    Example:
        >>> training_times(Config())  # of 8
        7
    """
    return max(1, int(config.rollout.steps * config.loss.timestep_fraction))


def pulls(loss: LossConfig) -> bool:
    """Whether a step looks at the base model's velocity.

    Example:
        >>> pulls(LossConfig(kl_weight=0.0)), pulls(LossConfig(kl_weight=0.0, norm_guard=1.0))
        (False, True)
    """
    return loss.kl_weight > 0 or loss.norm_guard > 0
