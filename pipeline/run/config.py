"""Typed, frozen configuration: one model per stage."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from ..competition.targets import ABDOMEN, TARGET_NAMES, TARGETS

Init = Literal["scratch", "imagenet", "voco2d"]
# Marks on fields. HOW: says how the work is done and changes no result: it enters no fingerprint.
# RESUMABLE: changes the result, but may change between two sittings of one pretraining.
# APART: of what follows a training, which the stage names among its inputs (`classifier/views.py`):
# a finished training is kept.
# ADDED: newer than the first finished runs; at its default it enters no fingerprint, so that what
# was finished before it was there stays up to date. New keys need it (tests/run/test_command.py).
HOW: JsonDict = {"how": True}
RESUMABLE: JsonDict = {"resumable": True}
APART: JsonDict = {"apart": True}
ADDED: JsonDict = {"added": True}


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _refuse(*rules: tuple[object, str]) -> None:
    """Raise ValueError with the text of the first rule whose condition holds."""
    for wrong, what in rules:
        if wrong:
            raise ValueError(what)


class PhantomConfig(Section):
    """Stage 00. Counts are patients; sizes are pixels and slices; `difficulty` 0 is plain to see, 1
    is faint.
    """

    train_patients: int = Field(200, ge=10, description="patients with labels")
    test_patients: int = Field(12, ge=1, description="patients of test_images/")
    unlabelled_patients: int = Field(40, ge=0, description="patients of unlabelled/")
    image_size: int = Field(128, ge=64, description="rows and columns of a slice")
    slices_min: int = Field(28, ge=12, description="least slices of a series")
    slices_max: int = Field(40, ge=12, description="most slices of a series")
    second_series: float = Field(
        0.25, ge=0, le=1, description="share of patients with a second contrast phase"
    )
    noise_hu: float = Field(
        12.0,
        ge=0,
        description="standard deviation of the noise in HU, before a hospital's kernel and dose",
    )
    difficulty: float = Field(0.2, ge=0, le=1, description="0: injuries are plain to see, 1: faint")
    bowel: float = Field(0.25, ge=0, le=1, description="prevalence of bowel injury")
    extravasation: float = Field(0.25, ge=0, le=1, description="prevalence of active extravasation")
    organ_low: float = Field(
        0.15, ge=0, le=0.5, description="prevalence of low grade, for kidney, liver and spleen each"
    )
    organ_high: float = Field(
        0.15,
        ge=0,
        le=0.5,
        description="prevalence of high grade, for kidney, liver and spleen each",
    )
    prevalence: Literal["enriched", "real"] = Field(
        "enriched",
        description="real: the competition's, in place of the four keys above",
        json_schema_extra=ADDED,
    )
    coverage: float = Field(
        1.0,
        ge=0.3,
        le=1,
        description="least share of a scan that is abdomen; chest and thighs are the rest",
        json_schema_extra=ADDED,
    )
    masks: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training series with organ masks in segmentations/",
        json_schema_extra=ADDED,
    )


class ConvertConfig(Section):
    """Stage 01. The intensity window is fixed and no option."""

    keep_png: bool = Field(
        True,
        description="off: stage 02 reads the images itself, and no slices are written",
        json_schema_extra={**HOW, **ADDED},
    )
    flip_hfs: bool = Field(
        False, description="rotate by PatientPosition FFS/HFP too (off: orientation tags decide)"
    )
    timeout_s: float = Field(60.0, gt=0, description="time limit of one file in a decoder")
    max_pixels: int = Field(
        4096 * 4096, ge=1, description="larger images are quarantined undecoded"
    )


class VolumeConfig(Section):
    """Stage 02: D x H x W of the stored volumes."""

    depth: int = Field(96, ge=2, description="planes of a volume")
    height: int = Field(256, ge=16, description="rows of a plane")
    width: int = Field(256, ge=16, description="columns of a plane")
    aspect: Literal["letterbox", "stretch"] = Field(
        "stretch",
        description="stretch: the body's box fills the plane, letterbox: in its own proportions",
    )
    margin_mm: float = Field(
        4.0, ge=0, description="kept around the body; what lies outside is black"
    )


class DataConfig(Section):
    """What of the data set is used."""

    limit: int = Field(
        0,
        ge=0,
        description="labelled, unlabelled and test patients each, 0: all",
        json_schema_extra=ADDED,
    )


class FoldConfig(Section):
    """Stage 03."""

    count: int = Field(5, ge=2, description="number of folds")
    by: Literal["patient", "hospital"] = Field(
        "patient",
        description=(
            "what is kept whole: hospital leaves one out a fold, by the column of"
            " train_series_meta.csv"
        ),
        json_schema_extra=ADDED,
    )


class ModelConfig(Section):
    """The 2D backbone that stages 04, 06 and 08 share: any timm model."""

    backbone: str = Field("efficientnet_b0", description="name of a timm model with a spatial map")
    weights: str | None = Field(
        None,
        description=(
            "file for init=imagenet: timm's weights, or a backbone.safetensors (none: timm's hub)"
        ),
    )


class VocoConfig(Section):
    """Stage 04: 2D-VoCo in the notation of docs/method.md, and what it is compared with."""

    method: Literal["voco2d", "height", "simclr", "masked"] = Field(
        "voco2d",
        description=(
            "what is learnt: where crops lie, their height, which two show one place, or what is"
            " hidden"
        ),
        json_schema_extra=ADDED,
    )
    steps: int = Field(250_000, ge=1, description="optimiser steps", json_schema_extra=RESUMABLE)
    batch: int = Field(4, ge=1, description="volumes a step; 1 needs inter=0")
    depth: int | None = Field(
        None,
        ge=2,
        description="planes that a volume is resampled to on reading (none: those stored)",
        json_schema_extra=ADDED,
    )
    slices: int = Field(32, ge=1, description="S, spread evenly over z")
    image_size: int = Field(
        192, ge=24, description="side of the planes that crops are cut from, pixels"
    )
    grid: int = Field(3, ge=2, description="K = grid * grid base crops")
    window: bool = Field(
        False,
        description="crops lie in an inner window of the plane, whose place is drawn",
        json_schema_extra=ADDED,
    )
    window_margin: float = Field(
        0.15,
        ge=0,
        lt=0.5,
        description="share of the plane that the window leaves on each side",
        json_schema_extra=ADDED,
    )
    window_jitter: float = Field(
        0.08,
        ge=0,
        lt=0.5,
        description="share of the plane by which it is moved at most",
        json_schema_extra=ADDED,
    )
    z_bins: int = Field(
        1,
        ge=1,
        description="Z slabs along z, of slices / z_bins slices each; base crops are (tile, slab)",
        json_schema_extra=ADDED,
    )
    random_crops: int = Field(2, ge=1, description="R, random crops of a volume")
    pool: Literal["clip", "slice"] = Field(
        "clip", description="an embedding is of the mean over a crop's slices, or of each slice"
    )
    width: int = Field(2048, ge=8, description="of the projector's three layers")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of the student's features left out")
    dropout_at: Literal["mean", "slices"] = Field(
        "mean",
        description="on the mean over slices, or on each slice's features before it",
        json_schema_extra=ADDED,
    )
    intra: float = Field(1.0, ge=0, description="weight of the term within a volume")
    intra_loss: Literal["published", "softmax"] = Field(
        "published",
        description=(
            "each base crop by itself, or cross entropy of a softmax over all base crops of the"
            " volume"
        ),
        json_schema_extra=ADDED,
    )
    symmetric: bool = Field(
        False,
        description="intra compares the teacher's random with the student's base crops too",
        json_schema_extra=ADDED,
    )
    base_encoder: Literal["teacher", "student"] = Field(
        "teacher",
        description=(
            "whose base crops intra compares with: the averaged teacher's, or the student's own,"
            " which learn too (needs inter=0, symmetric=false)"
        ),
        json_schema_extra=ADDED,
    )
    inter: float = Field(1.0, ge=0, description="weight of the term between volumes")
    regularisation: float = Field(
        1.0, ge=0, description="weight of the term that keeps base crops apart"
    )
    ema_momentum: float = Field(0.9, ge=0, lt=1, description="of the averaged teacher")
    ema_final: float | None = Field(
        None, ge=0, le=1, description="cosine momentum schedule to this value (none: constant)"
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="of method=simclr and intra_loss=softmax",
        json_schema_extra=ADDED,
    )
    masked: float = Field(
        0.6,
        gt=0,
        lt=1,
        description="share of a crop that method=masked hides",
        json_schema_extra=ADDED,
    )
    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW, not on norms and biases")
    amsgrad: bool = Field(True, description="AdamW's variant that keeps the largest second moment")
    warmup: int = Field(5000, ge=0, description="steps over which the learning rate rises")
    clip: float = Field(1.0, gt=0, description="gradient norm")
    init: Literal["scratch", "imagenet"] = Field(
        "imagenet", description="what the backbone starts from"
    )
    augment: bool = Field(True, description="augmentation: jitter, turn and intensity")
    jitter: bool = Field(
        True,
        description=(
            "evenly spread slices start at a random one, so that all slices are seen in time"
        ),
    )
    turn: float = Field(
        0.2,
        ge=0,
        le=1,
        description="probability that a crop is mirrored or turned by right angles within its box",
    )
    intensity: float = Field(
        0.5, ge=0, le=1, description="probability of a change of brightness, contrast and gamma"
    )
    unlabelled: float = Field(
        1.0, ge=0, le=1, description="share of the unlabelled volumes that is used"
    )
    labelled: bool = Field(
        True, description="use the competition's own series (their labels are never read)"
    )
    patients: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of all patients, of whatever source, that is used",
        json_schema_extra=ADDED,
    )
    exclude_fold: int | None = Field(
        None,
        ge=0,
        description="images of this fold's patients are not seen (needs stage 03)",
        json_schema_extra=ADDED,
    )
    holdout: int = Field(
        32, ge=2, description="volumes held out for the position accuracy, at most a quarter of all"
    )
    eval_every: int = Field(
        1000,
        ge=1,
        description="steps between two evaluations on held-out volumes",
        json_schema_extra=RESUMABLE,
    )
    checkpoint_every: int = Field(
        1000, ge=1, description="steps between two checkpoints", json_schema_extra=RESUMABLE
    )
    checkpoint_minutes: float = Field(
        10.0,
        ge=0,
        description="a checkpoint after so long too, whatever the steps take, 0: by steps alone",
        json_schema_extra={**RESUMABLE, **HOW, **ADDED},
    )
    keep: int = Field(3, ge=1, description="last checkpoints kept", json_schema_extra=RESUMABLE)
    log_every: int = Field(
        1, ge=1, description="steps between two rows of log.jsonl", json_schema_extra=RESUMABLE
    )
    collapse_std: float = Field(
        0.02,
        ge=0,
        description="embedding standard deviation (1: spread out) below which they have collapsed",
        json_schema_extra=RESUMABLE,
    )
    collapse_patience: int = Field(
        500, ge=1, description="steps of collapse before the run stops", json_schema_extra=RESUMABLE
    )
    settle: int = Field(
        32,
        ge=0,
        description=(
            "batches of whole slices that the exported batch-norm statistics are taken from, 0: of"
            " crops"
        ),
        json_schema_extra=RESUMABLE,
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that load data (none: by cores, memory and /dev/shm)",
        json_schema_extra=HOW,
    )
    amp: bool = Field(True, description="mixed precision where the device gains by it")
    compile: Literal[False, True, "reduce-overhead"] = Field(
        False,
        description=(
            "torch.compile of the backbones; reduce-overhead: and CUDA graphs of their passes, on a"
            " GPU"
        ),
        json_schema_extra=HOW,
    )
    activation_checkpointing: bool = Field(
        False,
        description="activations are made again in the backward pass: less memory, more time",
        json_schema_extra=HOW,
    )

    @property
    def crop(self) -> int:
        """Side of a crop, pixels."""
        return self.image_size // self.grid

    @model_validator(mode="after")
    def _consistent(self) -> "VocoConfig":
        voco2d = self.method == "voco2d"
        _refuse(
            (
                voco2d and self.batch == 1 and self.inter,
                "batch=1 has no next volume for the term inter: set inter=0",
            ),
            (
                voco2d and self.base_encoder == "student" and (self.inter or self.symmetric),
                "base_encoder=student has no teacher to compare with: set inter=0 and"
                " symmetric=false, or base_encoder=teacher",
            ),
            (
                self.slices % self.z_bins,
                f"slices={self.slices} is no multiple of z_bins={self.z_bins}",
            ),
            (
                self.z_bins > 1 and self.pool == "slice",
                "z_bins divides clips: it needs pool=clip",
            ),
            (
                self.window and self.window_jitter > self.window_margin,
                f"window_jitter={self.window_jitter} is more than"
                f" window_margin={self.window_margin}: the window would leave the plane",
            ),
        )
        return self


class OrganConfig(Section):
    """Stage 05: one small U-Net a fold, trained on the masks in `segmentations/`."""

    enabled: bool = Field(
        True, description="off: the stage is skipped, as where there are no masks"
    )
    init: Init = Field("voco2d", description="what the encoder starts from")
    steps: int = Field(4000, ge=1, description="optimiser steps of a fold")
    batch: int = Field(32, ge=1, description="planes a step")
    image_size: int = Field(256, ge=32, description="side of the planes that the network sees")
    width: int = Field(
        16, ge=4, description="channels of the decoder's finest map; coarser ones double it"
    )
    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    backbone_lr: float = Field(1.0, gt=0, description="backbone learning rate as a factor of lr")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW, not on norms and biases")
    warmup: float = Field(0.05, ge=0, le=1, description="share of all steps")
    clip: float = Field(1.0, gt=0, description="gradient norm")
    rotate_deg: float = Field(
        10.0, ge=0, le=180, description="most that a plane is turned, degrees"
    )
    scale: float = Field(0.1, ge=0, lt=1, description="most that a plane is scaled, as a share")
    shift: float = Field(
        0.05, ge=0, lt=1, description="most that a plane is shifted, as a share of its side"
    )
    contrast: float = Field(0.1, ge=0, le=1, description="and brightness")
    amp: bool = Field(True, description="mixed precision where the device gains by it")
    log_every: int = Field(
        20, ge=1, description="steps between two rows of log.jsonl", json_schema_extra=HOW
    )
    checkpoint_every: int = Field(
        200, ge=1, description="steps between two checkpoints", json_schema_extra=HOW
    )
    workers: int | None = Field(
        None, ge=0, description="as pretrain.workers", json_schema_extra=HOW
    )


class AugmentConfig(Section):
    """One draw for all slices of a volume. Flips in x are off: they move the liver to the left."""

    probability: float = Field(
        0.8,
        ge=0,
        le=1,
        description="of a turn, scale and shift, and of a change of brightness and contrast",
    )
    flip_x: bool = Field(False, description="mirror left and right at random")
    flip_y: bool = Field(False, description="mirror front and back at random")
    flip_z: bool = Field(False, description="mirror top and bottom at random")
    rotate_deg: float = Field(
        10.0, ge=0, le=180, description="most that a volume is turned in the plane, degrees"
    )
    scale: float = Field(0.1, ge=0, lt=1, description="most that it is scaled, as a share")
    shift: float = Field(
        0.05, ge=0, lt=1, description="most that it is shifted, as a share of its side"
    )
    brightness: float = Field(
        0.1, ge=0, le=1, description="most that is added, as a share of all greys"
    )
    contrast: float = Field(0.1, ge=0, le=1, description="most that contrast changes, as a share")
    cutout: float = Field(0.0, ge=0, le=1, description="probability of one dropped rectangle")
    quarter_turn: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of one to three quarter turns in the plane",
        json_schema_extra=ADDED,
    )
    grey_curve: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of another grey curve: a shifted histogram or a gamma",
        json_schema_extra=ADDED,
    )
    boxes: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of several small dropped boxes",
        json_schema_extra=ADDED,
    )
    blur: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a Gaussian blur",
        json_schema_extra=ADDED,
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of Gaussian noise",
        json_schema_extra=ADDED,
    )
    elastic: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a smooth elastic deformation",
        json_schema_extra=ADDED,
    )
    z_jitter: bool = Field(
        True, description="each sampled slice is drawn from its bin while training"
    )


class SecondLevelConfig(Section):
    """Stage 06, after the classifier: a small recurrent model on its features of all planes."""

    enabled: bool = Field(False, description="its predictions take the place of the classifier's")
    hidden: int = Field(64, ge=4, description="units of the recurrent model, each way")
    epochs: int = Field(5, ge=1, description="passes over the training series")
    batch: int = Field(16, ge=1, description="series a step")
    lr: float = Field(2e-4, gt=0, description="learning rate")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="share of the features, and of the pooled states, left out"
    )
    noise: float = Field(
        1.0, ge=0, description="standard deviation of noise on a feature, in its own"
    )


class TrainConfig(Section):
    """Stage 06: one CNN-LSTM a fold."""

    targets: tuple[str, ...] = Field(TARGET_NAMES, description="which are trained and scored")
    init: Init = Field("voco2d", description="what the backbone starts from")
    label_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a fold's training patients that is used, stratified and nested",
    )
    regions: Literal["whole", "organs"] = Field(
        "whole",
        description=(
            "what a target looks at: the whole volume, or its organ's box of stage 05 (bowel and"
            " extravasation that of all organs)"
        ),
        json_schema_extra=ADDED,
    )
    region_margin: float = Field(
        0.1,
        ge=0,
        description="added to a region on each side, as a share of its side",
        json_schema_extra=ADDED,
    )
    slices: int = Field(48, ge=1, description="of each region")
    abdomen_slices: int | None = Field(
        None,
        ge=1,
        description=(
            "those of the abdomen's region, of which bowel and extravasation are told (none:"
            " slices, like the organs)"
        ),
        json_schema_extra=ADDED,
    )
    image_size: int = Field(192, ge=16, description="side of a slice's picture, pixels")
    crop: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share cut from each border of the stored plane before resizing",
    )
    crop_size: int | None = Field(
        None,
        ge=16,
        description=(
            "side in stored pixels of a square taken out before resizing, at a random place while"
            " training and in the middle otherwise (none: the whole plane)"
        ),
        json_schema_extra=ADDED,
    )
    channels: int = Field(
        1,
        ge=1,
        description="stored planes of a slice's picture, odd: its own and its neighbours in z",
        json_schema_extra=ADDED,
    )
    map_pool: Literal["both", "mean"] = Field(
        "both",
        description="features of a slice: mean and maximum of its map, or the mean alone",
        json_schema_extra=ADDED,
    )
    backbone_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout on the backbone's map",
        json_schema_extra=ADDED,
    )
    sequence: Literal["lstm", "gru", "transformer", "none"] = Field(
        "lstm", description="model over the slices"
    )
    pool: Literal["max", "mean", "attention"] = Field(
        "max", description="how its states become one"
    )
    hidden: int = Field(256, ge=4, description="units of the sequence model, each way")
    shortcut: bool = Field(
        True,
        description="features of a slice reach the heads beside the state of the sequence model",
        json_schema_extra=ADDED,
    )
    layers: int = Field(1, ge=1, description="of the sequence model")
    dropout: float = Field(0.3, ge=0, lt=1, description="before the heads")
    freeze_backbone: bool = Field(False, description="the backbone is not trained")
    epochs: int = Field(20, ge=1, description="passes over the training series")
    batch: int = Field(4, ge=1, description="volumes a forward pass")
    accumulate: int = Field(1, ge=1, description="batches a step")
    lr: float = Field(2e-4, gt=0, description="learning rate after warm-up")
    backbone_lr: float = Field(1.0, gt=0, description="backbone learning rate as a factor of lr")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW, not on norms and biases")
    warmup: float = Field(0.1, ge=0, le=1, description="share of all steps")
    lr_final: float = Field(0.0, ge=0, description="where the cosine ends", json_schema_extra=ADDED)
    cosine_steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps to the end of the cosine (none: all steps)",
        json_schema_extra=ADDED,
    )
    clip: float = Field(1.0, gt=0, description="gradient norm")
    slice_loss: float = Field(
        0.0, ge=0, description="weight of the slice-level loss (needs image_level_labels.csv)"
    )
    slice_weight: float = Field(
        1.0,
        ge=1,
        description="most that a positive slice weighs: as often as negatives are more, 1: off",
        json_schema_extra=ADDED,
    )
    positive_slices: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "probability that a training sample of a series with positive slices is moved to show"
            " one (needs image_level_labels.csv)"
        ),
        json_schema_extra=ADDED,
    )
    visible_loss: float = Field(
        0.0,
        ge=0,
        description=(
            "weight of a slice-level loss of liver, spleen and kidney: the patient's class by the"
            " organ's visible share (needs stage 05)"
        ),
        json_schema_extra=ADDED,
    )
    dice_loss: float = Field(
        0.0,
        ge=0,
        description=(
            "weight of an auxiliary loss: a decoder on the backbone finds the organs of the series"
            " that have masks (needs stage 05)"
        ),
        json_schema_extra=ADDED,
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), the shares of two volumes that are added, 0: off",
        json_schema_extra=ADDED,
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="the same for volumes that have a box of another one, 0: off",
        json_schema_extra=ADDED,
    )
    rarity: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "series are drawn with replacement, by the share of patients with their rarest class to"
            " the power of minus this, 0: each once an epoch"
        ),
        json_schema_extra=ADDED,
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, 0: off")
    eval_every: int = Field(
        1,
        ge=1,
        description="epochs between two scores of the held-out patients; the last one has its own",
        json_schema_extra=ADDED,
    )
    checkpoint_every: int = Field(
        1,
        ge=1,
        description="epochs between two checkpoints; the best and the last one have their own",
        json_schema_extra={**HOW, **ADDED},
    )
    patience: int = Field(0, ge=0, description="epochs without improvement before stopping, 0: off")
    amp: bool = Field(True, description="mixed precision where the device gains by it")
    compile: bool = Field(False, description="torch.compile of the backbone", json_schema_extra=HOW)
    workers: int | None = Field(
        None, ge=0, description="as pretrain.workers", json_schema_extra=HOW
    )
    augment: AugmentConfig = AugmentConfig()
    second_level: SecondLevelConfig = Field(
        SecondLevelConfig(), json_schema_extra={**APART, **ADDED}
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        names = set(self.targets)
        _refuse(
            (
                not names or names - set(TARGET_NAMES) or len(names) != len(self.targets),
                f"targets must be distinct names out of {', '.join(TARGET_NAMES)}",
            ),
            (self.lr_final > self.lr, f"lr_final={self.lr_final} is more than lr={self.lr}"),
            (
                self.channels % 2 == 0,
                f"channels={self.channels} is even: a slice has as many neighbours above as below",
            ),
            (
                self.regions == "organs" and (self.crop or self.crop_size),
                "crop and crop_size cut whole planes: with regions=organs leave them at 0 and null",
            ),
            (
                self.abdomen_slices and self.regions == "whole",
                "abdomen_slices are of a region: set regions=organs",
            ),
            (
                self.visible_loss and names <= {t.name for t in TARGETS if not t.organ},
                "visible_loss is of organs: targets has neither liver, spleen nor kidney",
            ),
            (
                self.slice_weight > 1 and not self.slice_loss,
                f"slice_weight={self.slice_weight} weights a loss that is off: set slice_loss",
            ),
            (
                self.dice_loss and self.freeze_backbone,
                "dice_loss teaches the backbone: freeze_backbone keeps it as it is",
            ),
            (
                (self.mixup or self.cutmix) and self.batch == 1,
                "mixup and cutmix mix the volumes of a batch: batch=1 has one",
            ),
        )
        return self

    @property
    def needs_organs(self) -> bool:
        """Whether training reads what stage 05 found."""
        return self.regions == "organs" or self.visible_loss > 0 or self.dice_loss > 0

    @property
    def needs_slice_labels(self) -> bool:
        """Whether training reads which slices show an injury."""
        return self.slice_loss > 0 or self.positive_slices > 0

    @property
    def region_names(self) -> tuple[str, ...]:
        """The regions that a sample shows one after another: `whole` alone, or those of the trained
        targets, each once, and the abdomen, of which slice labels speak.
        """
        if self.regions == "whole":
            return (self.regions,)
        names = [target.region for target in TARGETS if target.name in self.targets]
        return tuple(dict.fromkeys(names + [ABDOMEN] * (self.slice_loss > 0)))

    @property
    def region_slices(self) -> tuple[int, ...]:
        """How many slices a sample shows of each of `region_names`."""
        own = {ABDOMEN: self.abdomen_slices or self.slices}
        return tuple(own.get(name, self.slices) for name in self.region_names)

    @property
    def sample_slices(self) -> int:
        """Slices that the backbone sees of a series: those of all regions."""
        return sum(self.region_slices)

    def region_number(self, region: str) -> int:
        """The place of a region among `region_names`, or the first: the whole volume holds all."""
        names = self.region_names
        return names.index(region) if region in names else 0


class ScoreConfig(Section):
    """Stage 07, and the aggregation that stage 08 shares."""

    aggregate: Literal["mean", "max"] = Field(
        "mean", description="how the series of a patient become one prediction"
    )
    bootstrap: int = Field(2000, ge=0, description="resamples of patients for intervals")
    calibrate: bool = Field(True, description="fit temperatures and biases to the official score")
    nested_folds: int = Field(
        5,
        ge=2,
        description="folds in which calibration is fitted without the patients it is judged on",
    )


class PredictConfig(Section):
    """Stage 08."""

    time_budget_h: float | None = Field(
        None,
        gt=0,
        description="hours after which the patients left get the calibrated prior, none: no limit",
    )
    flips: tuple[Annotated[str, Field(pattern="^(x?y?z?|z?y?x?)$", min_length=1)], ...] = Field(
        (), description="views beside the plain one, each flipped in its axes, such as [y, zy]"
    )
    phases: int = Field(
        1,
        ge=1,
        description="views with the slices between: 2 of train.slices=48 are all of 96 planes",
        json_schema_extra=ADDED,
    )
    flush_every: int = Field(16, ge=1, description="patients between two writes of submission.csv")


class AblationConfig(Section):
    """Stage 10: `variants` are names with the keys that they change: of `model`, `pretrain` and
    `train`, `predict.phases` and `predict.flips`.

    The first of each of `pairs` is compared with the second, every variant that is first in none of
    them with `reference`; no two variants are compared twice.
    """

    variants: dict[str, dict[str, Any]] = Field(
        {},
        description=(
            "name: keys that it changes, of model, pretrain, train, predict.phases, predict.flips"
        ),
    )
    reference: str = Field(
        "", description="what a variant that is first in no pair is compared with"
    )
    primary: tuple[str, str] | None = Field(
        None,
        description="the pair named in advance; all others are corrected for being many",
        json_schema_extra=ADDED,
    )
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="[first, second]: differences that are told"
    )
    folds: tuple[int, ...] = Field(
        (),
        description="trained without and judged on these alone, none: all folds in turn",
        json_schema_extra=ADDED,
    )
    seeds: tuple[int, ...] = Field(
        (1, 2, 3), min_length=1, description="each variant is trained once with each"
    )
    bootstrap: int = Field(2000, ge=1, description="resamples of patients")
    probes: bool = Field(
        True,
        description="what the frozen backbones know of organs is asked too",
        json_schema_extra=ADDED,
    )
    neighbours: int = Field(15, ge=1, description="of the k-nearest-neighbour probe")

    @property
    def named_pairs(self) -> list[tuple[str, str]]:
        """The primary pair, where there is one, and `pairs`."""
        return [*([self.primary] if self.primary else []), *self.pairs]

    @model_validator(mode="after")
    def _known_names(self) -> "AblationConfig":
        named = [self.reference, *(name for pair in self.named_pairs for name in pair)]
        keys = [pair for changes in self.variants.values() for pair in changes.items()]
        rules = (
            (
                [name for name in named if self.variants and name not in self.variants],
                f"is none of the variants {', '.join(self.variants)}",
            ),
            (
                [first for first, second in self.named_pairs if first == second],
                "would be compared with itself",
            ),
            (
                [
                    name
                    for name in self.variants
                    if not name.replace("_", "").isalnum() or name == "pretrained"
                ],
                "is no name for a variant: letters, digits and _, and not 'pretrained'",
            ),
            (
                [
                    key
                    for key, _ in keys
                    if key.partition(".")[0] not in ("model", "pretrain", "train")
                    and key not in ("predict.phases", "predict.flips")
                ],
                "is the same for all variants: they may change keys of model,"
                " pretrain and train, predict.phases and predict.flips",
            ),
            (
                [key for key, value in keys if "." not in key or isinstance(value, dict)],
                "would set all keys of a section: name single ones, such as train.init",
            ),
        )
        _refuse(
            *((wrong, f"'{wrong[0]}' {what}") for wrong, what in rules if wrong),
            (len(set(self.seeds)) < len(self.seeds), "seeds must be distinct"),
        )
        return self


class Config(Section):
    """A whole run. `phantom: null` means that `--data` must name the real data set."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="also of the output folder"
    )
    seed: int = Field(0, ge=0, description="of all draws")
    phantom: PhantomConfig | None = Field(None, description="null: --data must name a data set")
    data: DataConfig = DataConfig()
    convert: ConvertConfig = ConvertConfig()
    volume: VolumeConfig = VolumeConfig()
    folds: FoldConfig = FoldConfig()
    model: ModelConfig = ModelConfig()
    pretrain: VocoConfig = VocoConfig()
    organs: OrganConfig = OrganConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    predict: PredictConfig = PredictConfig()
    ablation: AblationConfig = AblationConfig()

    @model_validator(mode="after")
    def _depths_fit(self) -> "Config":
        read = "pretrain" if self.pretrain.depth else "volume"
        depth = self.pretrain.depth or self.volume.depth
        stored, most = self.volume.depth, -(-self.volume.depth // self.train.slices)
        _refuse(
            (
                self.pretrain.slices > depth,
                f"pretrain.slices={self.pretrain.slices} is more than {read}.depth={depth}",
            ),
            (
                self.train.needs_organs and not self.organs.enabled,
                "train.regions=organs, train.visible_loss and train.dice_loss need stage 05: set"
                " organs.enabled=true, or leave them off",
            ),
            (
                self.train.slices > stored,
                f"train.slices={self.train.slices} is more than volume.depth={stored}",
            ),
            (
                (self.train.abdomen_slices or 0) > stored,
                f"train.abdomen_slices={self.train.abdomen_slices} is more than"
                f" volume.depth={stored}",
            ),
            (
                self.predict.phases > most,
                f"predict.phases={self.predict.phases} is more than {most}, with which"
                f" train.slices={self.train.slices} are all of volume.depth={stored}",
            ),
        )
        return self

    @model_validator(mode="after")
    def _crops_fit(self) -> "Config":
        for name, side in (("height", self.volume.height), ("width", self.volume.width)):
            left = side - 2 * round(side * self.train.crop)
            if left < 1:
                raise ValueError(
                    f"train.crop={self.train.crop} leaves nothing of volume.{name}={side}"
                )
            if (self.train.crop_size or 1) > left:
                raise ValueError(
                    f"train.crop_size={self.train.crop_size} is more than the {left} pixels that"
                    f" train.crop={self.train.crop} leaves of volume.{name}={side}"
                )
        if self.pretrain.image_size % self.pretrain.grid:
            raise ValueError(
                f"pretrain.image_size={self.pretrain.image_size} is no multiple of"
                f" pretrain.grid={self.pretrain.grid}"
            )
        return self

    @model_validator(mode="after")
    def _pretraining_fits(self) -> "Config":
        options = self.pretrain
        inside = 1 - 2 * options.window_margin
        for name, side in (("height", self.volume.height), ("width", self.volume.width)):
            if options.window and (left := int(inside * side)) < options.grid:
                raise ValueError(
                    f"pretrain.window_margin={options.window_margin} leaves {left} pixels of"
                    f" volume.{name}={side} for pretrain.grid={options.grid}"
                )
        if options.exclude_fold is not None and options.exclude_fold >= self.folds.count:
            raise ValueError(
                f"pretrain.exclude_fold={options.exclude_fold} is none of folds.count="
                f"{self.folds.count} folds, which count from 0"
            )
        return self

    @model_validator(mode="after")
    def _phantom_slices(self) -> "Config":
        if self.phantom and self.phantom.slices_min > self.phantom.slices_max:
            raise ValueError("phantom.slices_min is more than phantom.slices_max")
        return self


def resolved(section: BaseModel | dict[str, Any] | None) -> Any:
    """A section as plain JSON values, the form that manifests and checkpoints keep."""
    return section.model_dump(mode="json") if isinstance(section, BaseModel) else section


def marked(section: type[BaseModel], *marks: JsonDict) -> set[str]:
    """Names of the fields of a section that bear one of `marks`."""
    return {
        name
        for name, field in section.model_fields.items()
        if isinstance(extra := field.json_schema_extra, dict)
        and any(mark.items() <= extra.items() for mark in marks)
    }


def decisive(section: Any, *left_out: JsonDict) -> Any:
    """A section (or a plain value) as plain values, without the keys that do not decide what comes
    out: those marked HOW, APART or with one of `left_out`, and those ADDED while at their defaults.
    """
    if not isinstance(section, BaseModel):
        return section
    kind, plain = type(section), resolved(section)
    out, added = marked(kind, HOW, APART, *left_out), marked(kind, ADDED)
    return {
        name: decisive(value, *left_out) if isinstance(value, BaseModel) else plain[name]
        for name, value in section
        if name not in out
        and (
            name not in added
            or value != kind.model_fields[name].get_default(call_default_factory=True)
        )
    }
