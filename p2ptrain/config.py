"""The run file (`RunConfig`: shared by all peers, hashed) and the peer file (`PeerConfig`: local, free).

Whatever changes the result of training is in the run; whatever only changes how this machine takes part is in
the peer file. Both are TOML, and data, never code. A run also arrives from strangers, as canonical JSON: it
is bounded, checked like a file, and no path in it is ever opened (see `check_together`).

Every field is followed by its documentation, which `explain`, `schema` and `commented_toml` hand out again.

Not covered: that this machine has the memory and the speed which a run asks for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import textwrap
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from p2ptrain import PROTOCOL_VERSION, timetable
from p2ptrain.errors import BadMessage, ConfigError

RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Address = Annotated[
    str, Field(pattern=r"^(/[A-Za-z0-9.:%_-]+){2,}$", max_length=300, examples=["/ip4/0.0.0.0/tcp/31337"])
]
# Not strict as a tuple, or TOML's lists would be refused; its items still are.
Addresses = Annotated[tuple[Address, ...], Field(strict=False, max_length=16)]

MAX_MICRO_BATCH_SIZE = 65_536


def _size_or_auto(value: object) -> object:
    """One complaint, in the words of the schema, where a union of types would make one for each."""
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_MICRO_BATCH_SIZE):
        return value
    raise AssertionError  # a ValueError would bring its own words


MicroBatchSize = Annotated[
    int | Literal["auto"],
    PlainValidator(_size_or_auto),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_MICRO_BATCH_SIZE}, {"const": "auto"}]}
    ),
]

MAX_FILE_BYTES = 64 * 1024
"""Of a run or peer file, and of a run from the swarm; the default run with all its comments takes a tenth."""


class Section(BaseModel):
    """A table of a run or peer file: frozen, nothing coerced, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)

# -- the run -------------------------------------------------------------------------------------------------


class TaskSection(Section):
    """What a run trains. Its `kind` says which of these tables it is."""

    @property
    def summary(self) -> str:
        """Model and data in a few words."""
        raise NotImplementedError

    @property
    def names(self) -> dict[str, str]:
        """Key of the peer file → what this run calls the thing whose place on this machine it must give."""
        return {}

    @property
    def tokens_per_sample(self) -> int:
        return 1


class BytesTask(TaskSection):
    """A byte-level transformer language model on plain text."""

    kind: Literal["bytes"] = "bytes"
    """What is trained: a transformer that predicts the next byte of plain text."""

    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Transformer blocks. Memory, computing time and bytes per round grow in proportion."""

    width: Annotated[int, Field(ge=8, le=4096)] = 128
    """Values per position between blocks; must be divisible by twice `heads`. Parameters, and with them the
    bytes of every round, grow with its square."""

    heads: Annotated[int, Field(ge=1, le=64)] = 4
    """Attention heads per block, each of width / heads values. Setting it high will leave each head too
    narrow to tell positions apart."""

    context: Annotated[int, Field(ge=8, le=8192)] = 128
    """Bytes in a sample, and how far back the model can look. Setting it low will make it forget how a
    sentence began; setting it high will cost attention time that grows with its square."""

    corpus: Annotated[str, Field(min_length=1, max_length=300)] = "stdlib"
    """The text to learn. `stdlib` is the source of the Python that runs the peer, so everyone has it.
    Anything else only names the text: each peer says in its own peer file where that text is on its machine,
    because a path that a stranger wrote is never opened."""

    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the text that is never trained on and gives the held-out loss. Setting it low will make that
    loss jump about; setting it high will leave less to learn from."""

    exact: bool = False
    """Whether every peer must have the same text to the byte. If true, a peer whose corpus digest differs
    from the swarm's is refused; if false, texts may differ, as they do between Python versions, and so may
    held-out figures."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"task.width ({self.width}) must be divisible by twice task.heads ({self.heads}), because "
                "each head turns its values in pairs; the nearest width that is: "
                f"{max(1, round(self.width / (2 * self.heads))) * 2 * self.heads}"
            )
        return self

    @property
    def summary(self) -> str:
        size = f"{self.layers} layers of width {self.width}"
        return f"{size} on samples of {self.context} bytes from {self.corpus}"

    @property
    def names(self) -> dict[str, str]:
        return {} if self.corpus == "stdlib" else {"corpus": self.corpus}

    @property
    def tokens_per_sample(self) -> int:
        return self.context


class DigitsTask(TaskSection):
    """A small classifier of the 1,797 pictures of handwritten digits that come with scikit-learn."""

    kind: Literal["digits"] = "digits"
    """What is trained: a network of one hidden layer that names handwritten digits. It needs the extra
    `p2ptrain[digits]`, and learns within seconds: for trying out a swarm."""

    width: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Values in the hidden layer. Parameters, and with them the bytes of every round, grow in proportion."""

    @property
    def summary(self) -> str:
        return f"a hidden layer of width {self.width} on scikit-learn's digits"


WORD = "[A-Za-z0-9][A-Za-z0-9_.-]*"

Named = Annotated[str, Field(pattern=f"^{WORD}(/{WORD})?$", max_length=200, examples=["owner/name"])]
"""`owner/name` is on the Hugging Face hub; without a slash it is built in, or a name that each peer's own
file gives a place. Never a path: what a stranger wrote is not opened."""

Revision = Annotated[str, Field(pattern=f"^{WORD}(/{WORD})*$", max_length=100, examples=["main"])]


class CausalLmTask(TaskSection):
    """A language model of the Hugging Face libraries, trained to predict the next token."""

    kind: Literal["causal_lm"] = "causal_lm"
    """What is trained: a language model of the Hugging Face libraries predicts the next token. It needs the
    extra `p2ptrain[hf]`."""

    model: Named = "llama"
    """The model. `llama` is a new one of the sizes below; `owner/name` is one from the Hugging Face hub. Any
    other name says that each peer has it in a folder, which its own peer file names as `model`."""

    model_revision: Revision = "main"
    """Branch, tag or commit of a model from the hub. A commit makes sure that all peers get the same."""

    pretrained: bool = True
    """Whether a model that has a name starts from its weights; if false, only from its `config.json`, with
    random weights drawn by `seed`."""

    layers: Annotated[int, Field(ge=1, le=256)] = 4
    """llama: transformer blocks. Memory, computing time and bytes per round grow in proportion."""

    width: Annotated[int, Field(ge=8, le=16_384)] = 256
    """llama: values per position between blocks; must be divisible by twice `heads`. Parameters, and with
    them the bytes of every round, grow with its square."""

    heads: Annotated[int, Field(ge=1, le=256)] = 4
    """llama: attention heads per block, each of width / heads values."""

    context: Annotated[int, Field(ge=8, le=131_072)] = 256
    """Tokens in a sample, and how far back the model can look in training. Setting it high will cost memory
    in proportion, and attention time that grows with its square."""

    tokenizer: Named = "bytes"
    """How text becomes tokens. `bytes`: a token is a byte; `model`: as the model's own folder says;
    `owner/name` is one from the hub. Any other name says that each peer has it in a folder, which its own
    peer file names as `tokenizer`. Peers whose tokenizers differ refuse each other."""

    tokenizer_revision: Revision = "main"
    """Branch, tag or commit of a tokenizer from the hub."""

    dataset: Named = "stdlib"
    """The text to learn. `stdlib` is the source of the Python that runs the peer; `owner/name` is a dataset
    from the hub, read as it is needed and never stored whole. Any other name says that each peer has it: its
    own peer file names as `corpus` a text file, JSON lines, Parquet, or a folder of one of these."""

    dataset_revision: Revision = "main"
    """Branch, tag or commit of a dataset from the hub. A commit makes sure that all peers draw the same."""

    subset: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]*$", max_length=100, examples=["sample-10BT"])] = ""
    """Which part of a dataset from the hub, in its own words; empty for its default one."""

    split: Annotated[str, Field(pattern=f"^{WORD}$", max_length=100, examples=["train"])] = "train"
    """Which split of a dataset from the hub is trained on."""

    column: Annotated[str, Field(min_length=1, max_length=100)] = "text"
    """JSON lines, Parquet and datasets from the hub: the column that holds the text."""

    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the text that is never trained on and gives the held-out loss. Setting it low will make that
    loss jump about; setting it high will leave less to learn from."""

    exact: bool = False
    """Whether every peer must have the same data. If true, a peer whose files differ from the swarm's by a
    byte is refused, and reading them all delays its start; if false, data may differ, and so may held-out
    figures."""

    @model_validator(mode="after")
    def _model_has_what_it_needs(self) -> Self:
        if self.model == "llama" and self.width % (2 * self.heads):
            raise ValueError(
                f"task.width ({self.width}) must be divisible by twice task.heads ({self.heads}), because "
                "each head turns its values in pairs"
            )
        if self.model == "llama" and self.tokenizer == "model":
            raise ValueError(
                'task.tokenizer is "model", but a new llama has none; set it to "bytes" or to the name of one'
            )
        return self

    @property
    def summary(self) -> str:
        sizes = f"a new llama of {self.layers} layers of width {self.width}"
        model = (
            sizes if self.model == "llama" else f"{self.model}{'' if self.pretrained else ' from scratch'}"
        )
        text = " ".join(filter(None, [self.dataset, self.subset]))
        return f"{model} on samples of {self.context} tokens ({self.tokenizer}) from {text}"

    @property
    def names(self) -> dict[str, str]:
        said = {
            "model": (self.model, ("llama",)),
            "tokenizer": (self.tokenizer, ("bytes", "model")),
            "corpus": (self.dataset, ("stdlib",)),
        }
        return {key: name for key, (name, known) in said.items() if "/" not in name and name not in known}

    @property
    def tokens_per_sample(self) -> int:
        return self.context


SettingName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=100)]
Setting = Annotated[str, Field(max_length=1000)] | bool | int | float


class OwnTask(TaskSection):
    """Anything that a package of yours, or of somebody else, trains."""

    kind: Literal["own"] = "own"
    """What is trained: whatever a Python package says that is installed on every peer, and that each peer
    has allowed by its name, as `allow_tasks` in its own peer file."""

    factory: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$|^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
            max_length=200,
            examples=["package.module:factory"],
        ),
    ] = "package.module:factory"
    """What makes the task: `package.module:factory`, or the name of an entry point in the group
    `p2ptrain.tasks`."""

    settings: Annotated[
        dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")], Setting], Field(max_length=64)
    ] = {}
    """What the factory is given: texts, numbers, true and false, by names that it knows."""

    def __hash__(self) -> int:
        """As other sections have it by themselves: a run is a value, and may be a key."""
        return hash((self.factory, *sorted(self.settings)))

    @property
    def summary(self) -> str:
        return f"what {self.factory} says"


def _kind_of(value: object) -> str:
    """A task without a kind is the one of bytes: run files from before there were others name none."""
    kind = value.get("kind", "bytes") if isinstance(value, dict) else getattr(value, "kind", "bytes")
    return kind if isinstance(kind, str) else _shown(kind)


AnyTask = Annotated[
    Annotated[BytesTask, Tag("bytes")]
    | Annotated[DigitsTask, Tag("digits")]
    | Annotated[CausalLmTask, Tag("causal_lm")]
    | Annotated[OwnTask, Tag("own")],
    Discriminator(_kind_of),
]
KINDS = ("bytes", "digits", "causal_lm", "own")
"""Of `task.kind`, the default one first."""


LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200, examples=["q_proj"])]


class Lora(Section):
    """Low-rank adapters, which are trained in place of the model with `payload = "lora"`."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of each adapter. Parameters, and with them the bytes of every round, grow in proportion. Setting
    it low will leave too little room for what is new in the text."""

    alpha: Annotated[int, Field(ge=1, le=4096)] = 16
    """What the adapters add is multiplied by alpha / rank: setting it high has the effect of a higher
    learning rate."""

    rank_stabilized: bool = False
    """Whether it is alpha / √rank instead (rsLoRA), with which high ranks learn as fast as low ones."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is left out at random in training, against learning a small text by
    heart."""

    target_modules: Annotated[tuple[LayerName, ...], Field(strict=False, max_length=64)] = ()
    """Linear layers to adapt, by the ends of their names, such as `q_proj`; empty for all but the head."""


class Optimizer(Section):
    """The rule that turns the averaged gradient into a step; every peer applies it to the same bytes."""

    kind: Literal["adamw", "sgd", "lamb"] = "adamw"
    """`adamw` scales each parameter's step by its gradient's history and keeps 8 bytes of state per
    parameter, which newcomers download; `sgd` keeps 4 and needs its `lr` tuned more carefully; `lamb`, for
    very large batches, is `adamw` whose step moves each tensor by the share `lr` of its length."""

    lr: Annotated[float, Field(gt=0, le=10)] = 1.5e-3
    """Learning rate after warm-up. Setting it high will make the loss rise or turn into noise, setting it low
    will waste rounds. It suits one `target_batch_size`: change both together, or see `batch_rule`."""

    batch_rule: Literal["none", "linear", "sqrt"] = "none"
    """What becomes of these settings where `target_batch_size` is k times `tuned_batch_size`: `none` leaves
    them, `linear` multiplies `lr` by k, which suits `sgd`, `sqrt` by the root of k; then with `adamw` the
    betas and `epsilon` follow, so that averages span as many samples as before. Both rules hold up to the
    critical batch; beyond it the rate that they give is too high."""

    tuned_batch_size: Annotated[int, Field(ge=0, le=2**24)] = 0
    """The `target_batch_size` that these settings were found with, for `batch_rule`; 0: not said."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share by which matrices shrink in each step, times the learning rate, apart from the gradient; vectors
    such as norms are spared."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adamw, lamb: how much of the running mean of gradients is kept in each step."""

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """adamw, lamb: how much of the running mean of squared gradients is kept in each step. Setting it high
    will keep steps small long after a burst of large gradients; setting it low will make steps noisy."""

    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """adamw, lamb: added to the root of the mean squared gradient, so that nothing is divided by zero."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd: how much of the last step is repeated in the next; 0 for none."""

    nesterov: bool = True
    """sgd: whether the gradient counts once more on top of the momentum (Nesterov)."""

    clip_norm: Annotated[float, Field(ge=0, le=10**9)] = 1.0
    """Longest averaged gradient (Euclidean norm over all parameters) that is applied as it is; a longer one
    is scaled down to it, and 0 scales none. Setting it low will shorten all steps, not only the wild ones."""


class Local(Section):
    """Strategy `local`: peers train apart for `target_batch_size` samples of all of them, then average."""

    inner_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Samples in one step that a peer takes alone. With n peers, target_batch_size / (n * inner_batch_size)
    such steps lie between two averages; 20 to 500 are usual."""

    outer_learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Share of the average change that is taken. With 1 and no momentum, copies are simply averaged."""

    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the last outer step is repeated in the next (Nesterov). It lets many steps lie between
    rounds, and needs some 30 rounds to pay. Outer steps become outer_learning_rate / (1 - outer_momentum)
    times as long in the end, so choose `optimizer.lr` anew."""

    weighting: Literal["samples", "fednova"] = "samples"
    """How peers that took unlike numbers of steps are weighed. `samples`: by their samples, so the fast ones
    pull the most; `fednova`: as if all had taken equally many, which keeps to the goal where data differ."""

    warmup_rounds: Annotated[int, Field(ge=0, lt=10**9)] = 0
    """Rounds at first in which all take one synchronized step, as with strategy `sync`: to train apart costs
    the most while the loss falls fast. The steps that each peer then takes alone go on with the optimizer
    state that these have led to. They are rounds, and count as such in `schedule` and `total_steps`."""

    warmup_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 64
    """Samples of all peers together in each of these rounds, in place of `target_batch_size`."""


class Partition(Section):
    """Strategy `partition`, which is experimental: peers train parts of the model that do not overlap."""

    by: Literal["tensor", "block", "random"] = "tensor"
    """What a part is. `tensor`: whole tensors, as even as they can be shared out; `block`: a range of the
    flat vector; `random`: single coordinates, drawn by the seed. Parts of the latter know less of each other,
    and break sooner."""

    inner_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Samples in one step that a peer takes alone. With n peers, target_batch_size / (n * inner_batch_size)
    such steps lie between two unions. More than about 5 make parts undo each other's work: see `gamma`."""

    rotate_every: Annotated[int, Field(ge=0, lt=10**9)] = 0
    """Rounds after which every part goes to another peer, with its optimizer state; 0: only when somebody
    comes or goes. Each peer's data then gets to every part of the model."""

    gamma: Literal["1", "1/n", "auto"] = "auto"
    """By what the union of all parts' changes is multiplied. `1`: applied as it is, and with many steps
    between rounds training may diverge; `1/n`: divided by the number of peers, which is safe and slow;
    `auto`: the best of 1, 1/2, 1/4 and 1/n for the round that was last measured."""

    probe_every: Annotated[int, Field(ge=1, lt=10**9)] = 5
    """Rounds between two in which it is measured how well the parts fit together, by the loss on a few
    samples that nobody trains on. That takes each peer about as long as 30 samples, and with `auto` as 60:
    setting it low will cost that often, setting it high will let parts undo each other's work for so long."""


class Outer(Section):
    """A second momentum around the optimizer's steps (DiLoCo's outer step), which costs no communication."""

    every: Annotated[int, Field(ge=0, lt=10**9)] = 0
    """Steps between two outer steps, such as 30; 0: none at all. With it a replica keeps 8 bytes more per
    parameter, which newcomers download, and tolerates larger batches. Choose `optimizer.lr` anew: steps
    become learning_rate / (1 - momentum) times as long in the end."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """How much of the last outer step is repeated in the next (Nesterov)."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Share of how far the steps have led that is taken. Setting it to 1 and `momentum` to 0 changes
    nothing."""


class Sync(Section):
    """Settings of strategy `sync`."""

    outer: Outer = Outer()
    """A second momentum, over many steps at once."""


class Schedule(Section):
    """The learning rate of each step, from the first to the last."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up the learning rate stays (`constant`) or falls until `total_steps` (`linear`, `cosine`). A
    run without a planned end wants `constant`."""

    warmup_steps: Annotated[int, Field(ge=0, lt=10**9)] = 50
    """Steps over which the learning rate rises from zero; less than `total_steps`. Setting it low will let
    the first steps, whose gradients are large, throw the model off."""

    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """`linear` and `cosine` end at this share of `optimizer.lr`."""


class RunConfig(Section):
    """A run file: what every peer of the run shares. One changed value makes another run."""

    run_id: RunId = "python-stdlib"
    """Name of the run, before all its keys in the DHT: lower-case letters, digits and dashes."""

    strategy: Literal["sync", "local", "partition"] = "sync"
    """`sync`: each step averages the gradients of one large batch over all peers. `local`: each peer takes
    steps of its own, and how far they led is what is averaged; see `[local]`. It needs far fewer rounds and
    learns less from each sample: the less, the more peers there are and the more steps lie between rounds.
    `partition`, experimental: each peer takes steps of its own on a part of the model that nobody else
    trains, and all parts are put together; see `[partition]`."""

    payload: Literal["full", "lora"] = "full"
    """`full`: all parameters are trained and averaged. `lora`: the model stays as it is, and adapters are
    trained for it, see `[lora]`: about a hundredth of the bytes. It needs the extra `p2ptrain[hf]`, and all
    peers must have the same model to the bit. With strategy `local` one factor of each adapter is trained in
    even rounds and the other in odd ones, so that their mean is exact."""

    total_steps: Annotated[int, Field(ge=1, le=10**9)] = 10_000
    """Synchronized steps after which the run is over. Changing it changes a `linear` or `cosine` schedule."""

    target_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Samples that all peers together accumulate before a step. Setting it low will make rounds so frequent
    that the network takes the time, not training; setting it high will need more samples for one loss."""

    min_peers: Annotated[int, Field(ge=1, le=256)] = 1
    """Fewest peers that may step. With 1 a peer that was cut off trains on alone, and rolls back later; with
    more than half of the swarm no two parts of it can train apart, but those left wait when many leave."""

    quorum: Literal["any", "majority"] = "any"
    """Who may step when peers are missing. `any`: whoever is there, so both sides of a split network go on,
    and when they meet again the side with fewer samples rolls back. `majority`: only with more than half of
    the last round's peers; the others wait, also for peers that will never come back, as when half of them
    leave at once. Before the first step there is no last round: set `min_peers` for that."""

    max_peers: Annotated[int, Field(ge=1, le=256)] = 64
    """Most peers in one round; when there are more, those that bring most samples are in. Setting it high
    will multiply connections and cut the gradient into ever smaller spans."""

    delay: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps by which a gradient may be older than the parameters it changes. With 0 all peers wait while a
    round is under way, and training is what one machine would do with the whole batch. With 1 they compute
    the next step's samples meanwhile: the wait is hidden, but those gradients do not know of the last step,
    so a high learning rate may need to be lower."""

    data: Literal["drawn", "leased"] = "drawn"
    """Which samples a step takes. `drawn`: each peer draws any of them, so some come often and some late.
    `leased`: all are numbered, and each counts once in every pass over the data, in an order that the seed
    shuffles; what a peer does not bring in goes to another, and a run that was stopped goes on where it
    stood. Needs data with an end that is the same on every peer (for text: `task.exact`, and no dataset from
    the hub), and `delay` 0; newcomers bring nothing to their first round."""

    codec: Literal["fp32", "fp16", "bf16", "int8", "int4", "topk", "lowrank"] = "fp16"
    """How gradients travel: `fp32` unchanged in 4 bytes per value, `fp16` rounded to 11 significant bits in
    2, `bf16` to 8 bits in 2, `int8` in 1.02, `int4` in 0.53, `topk` only the largest 1/32 of the values, in
    0.13, `lowrank` in about 0.08. What the last five lose is sent with later steps. Replicas stay bit-equal
    with any, because all peers decode the same bytes."""

    aggregation: Literal["mean", "multi_krum", "centered_clip", "trimmed_mean", "median", "norm_clip"] = (
        "mean"
    )
    """How the peers' gradients become one. `mean`: over all samples, exact, and one liar can ruin it. The
    others bound what a liar can do, for runs that strangers join: `multi_krum` leaves out the quarter of the
    peers (at least one) that is least like the rest, `centered_clip` shortens what is far from the median,
    `trimmed_mean` leaves out the highest and the lowest quarter of each value (at least one each), `median`
    all but the middle. Those two forget what only few peers saw in a step, such as rare words. `norm_clip`
    shortens what is much longer than the last step's gradient: the cheapest, and the weakest. With fewer than
    3 peers at work all are `mean`: set `min_peers` to 3 or more."""

    audit: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that what a peer averaged for the others in a step is checked by another one, bit by bit:
    then all sign what they send, a lie proves itself, and whoever told it is heard no more. 0: no audit;
    1: one chunk of each peer's part in every step. For runs that strangers join, beside an `aggregation`
    that bounds what they contribute. Costs memory for one gradient and three times the model; needs codec
    `fp32` or `fp16`, and `max_peers` of at most 128."""

    # Measured with 2 peers on loopback, a round of 100 MB of fp32 over TLS: 0.27 s of one core per peer with
    # 65,536 values, 0.23 s with 131,072, 0.20 s with 262,144. A chunk in fp16 takes 21 ms at 100 Mbit/s.
    chunk_values: Annotated[int, Field(ge=1024, le=4 * 2**20)] = 131_072
    """Values per chunk, the piece of a gradient that is encoded and sent as one message. Setting it low will
    spend time on headers; setting it high will leave the network idle while the first chunk is encoded."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the first parameters and of which samples each peer draws."""

    heartbeat_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Longest time that a leader or member says nothing to the other. Setting it high will delay the start of
    rounds with slow members; setting it low will cost one small message per peer and beat."""

    silence_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Shortest time after which a peer that is not heard is taken for gone; at least 3 heartbeats. One that
    was seen to be late gets more, by as much. Setting it low will drop peers for a hiccup of their network;
    setting it high will make all wait that long for one that vanished without a word."""

    silence_most_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Longest such time, whatever was seen; at least `silence_seconds`."""

    attempt_most_seconds: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """Longest time that an attempt to average may take, apart from unfinished work. Within it the deadline
    follows the measured pace of the links, the bytes and the number of peers, and doubles when it was
    missed. Setting it low will make no round ever succeed over slow links."""

    task: AnyTask = BytesTask()
    """What is trained: model and data. `kind` chooses the table's other keys."""

    lora: Lora = Lora()
    """The adapters of `payload = "lora"`."""

    optimizer: Optimizer = Optimizer()
    """How the averaged gradient is applied."""

    local: Local = Local()
    """Settings of strategy `local`; the steps that peers take apart are `optimizer`'s."""

    partition: Partition = Partition()
    """Settings of strategy `partition`; the steps that peers take apart are `optimizer`'s."""

    schedule: Schedule = Schedule()
    """How the learning rate moves over the run."""

    sync: Sync = Sync()
    """How strategy `sync` applies what it averages."""

    def _check_local(self) -> None:
        if self.strategy != "local":
            return
        if self.sync.outer.every:
            raise ValueError(
                'sync.outer.every must be 0 with strategy = "local", which has an outer step of its own; set '
                "local.outer_learning_rate and local.outer_momentum"
            )
        if self.delay:
            raise ValueError(
                f'delay ({self.delay}) must be 0 with strategy = "local": before an average is there, nobody '
                "knows where to take the next steps from"
            )
        if self.audit:
            raise ValueError(
                f'audit ({self.audit:g}) must be 0 with strategy = "local": what a peer has brought is '
                "gone when it takes its next steps, so nobody could read it again"
            )
        if self.local.warmup_rounds >= self.total_steps:
            raise ValueError(
                f"local.warmup_rounds ({self.local.warmup_rounds}) must be less than total_steps "
                f'({self.total_steps}), or peers never train apart; lower it, or set strategy to "sync"'
            )
        if self.target_batch_size < self.local.inner_batch_size:
            raise ValueError(
                f"target_batch_size ({self.target_batch_size}) must be at least local.inner_batch_size "
                f"({self.local.inner_batch_size}), or no peer takes a step between two averages; raise the "
                "first or lower the second"
            )

    def _check_partition(self) -> None:
        if self.strategy != "partition":
            return
        wanted = 'with strategy = "partition"'
        if self.sync.outer.every:
            raise ValueError(
                f"sync.outer.every must be 0 {wanted}: its momentum is for steps that all take together"
            )
        if self.delay:
            raise ValueError(
                f"delay ({self.delay}) must be 0 {wanted}: before the others' parts are there, nobody knows "
                "where to take the next steps from"
            )
        if self.audit:
            raise ValueError(
                f"audit ({self.audit:g}) must be 0 {wanted}: what a peer has brought is gone when it takes "
                "its next steps, so nobody could read it again"
            )
        if self.payload == "lora":
            raise ValueError(
                f'payload must be "full" {wanted}: the factors of an adapter only mean something together, '
                "so they cannot have two owners"
            )
        if self.aggregation != "mean":
            raise ValueError(
                f'aggregation must be "mean" {wanted}, not "{self.aggregation}": each coordinate has one '
                "owner, and there is nobody to compare it with"
            )
        if self.codec != "fp32":
            raise ValueError(
                f'codec must be "fp32" {wanted}, not "{self.codec}": the optimizer\'s state travels, too, '
                "and others lose its small values"
            )
        if self.optimizer.kind == "lamb":
            raise ValueError(
                f'optimizer.kind must be "adamw" or "sgd" {wanted}: "lamb" goes by the length of whole '
                "tensors, and an owner may have a part of one"
            )
        if self.target_batch_size < self.partition.inner_batch_size:
            raise ValueError(
                f"target_batch_size ({self.target_batch_size}) must be at least partition.inner_batch_size "
                f"({self.partition.inner_batch_size}), or no peer takes a step between two rounds; raise the "
                "first or lower the second"
            )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        self._check_local()
        self._check_partition()
        if self.min_peers > self.max_peers:
            raise ValueError(
                f"min_peers ({self.min_peers}) must be at most max_peers ({self.max_peers}), "
                "or no round could ever begin; lower min_peers or raise max_peers"
            )
        if 3 * self.heartbeat_seconds - self.silence_seconds > 1e-6:  # 3 × 0.1 is a little more than 0.3
            raise ValueError(
                f"silence_seconds ({self.silence_seconds:g}) must be at least 3 times heartbeat_seconds "
                f"({self.heartbeat_seconds:g}), or one late heartbeat would drop a healthy peer; "
                f"raise silence_seconds to {3 * self.heartbeat_seconds:g} or lower heartbeat_seconds"
            )
        if self.silence_most_seconds < self.silence_seconds:
            raise ValueError(
                f"silence_most_seconds ({self.silence_most_seconds:g}) must be at least silence_seconds "
                f"({self.silence_seconds:g}); raise the former or lower the latter"
            )
        if self.audit and self.codec not in ("fp32", "fp16"):
            raise ValueError(
                f"audit ({self.audit:g}) needs a codec that keeps nothing for later steps, fp32 or fp16, and "
                f"not {self.codec}: what is kept could not be checked; change the codec or set audit to 0"
            )
        if self.audit and self.max_peers > 128:
            raise ValueError(
                f"audit ({self.audit:g}) allows max_peers of at most 128, not {self.max_peers}: what a peer "
                "signs must name all others; lower max_peers or set audit to 0"
            )
        if self.schedule.warmup_steps >= self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be less than "
                f"total_steps ({self.total_steps}), or the run would never reach its learning rate; "
                "lower schedule.warmup_steps or raise total_steps"
            )
        self._check_leased()
        self._check_batch_rule()
        return self

    def _check_leased(self) -> None:
        if self.data == "drawn":
            return
        if self.delay:
            raise ValueError(
                f'data = "leased" needs delay = 0, not {self.delay}: who may take which samples follows from '
                'the last round, and with a delay that is not over yet; set delay to 0 or data to "drawn"'
            )
        if self.strategy not in ("sync", "local"):
            raise ValueError(
                f'data = "leased" needs strategy = "sync" or "local", not "{self.strategy}", with which it '
                'was never tried; set data to "drawn"'
            )
        if isinstance(self.task, CausalLmTask) and "/" in self.task.dataset:
            raise ValueError(
                f'data = "leased" needs data with an end, and {self.task.dataset} is read from the hub as a '
                'stream; set data to "drawn", or task.dataset to a name without a slash and have the files '
                "on every peer"
            )
        if isinstance(self.task, BytesTask | CausalLmTask) and not self.task.exact:
            raise ValueError(
                'data = "leased" needs task.exact = true: a sample is leased by its number, so all peers '
                'must have the same text; set task.exact to true or data to "drawn"'
            )

    @property
    def stepped_batch_size(self) -> int:
        """Samples in one step of `optimizer`: with strategies `local` and `partition`, of those that a peer
        takes alone."""
        match self.strategy:
            case "local":
                return self.local.inner_batch_size
            case "partition":
                return self.partition.inner_batch_size
            case "sync":
                return self.target_batch_size

    def _check_batch_rule(self) -> None:
        optimizer = self.optimizer
        if optimizer.batch_rule == "none":
            return
        if not optimizer.tuned_batch_size:
            raise ValueError(
                f'optimizer.batch_rule is "{optimizer.batch_rule}", but optimizer.tuned_batch_size is not '
                "set; say which target_batch_size the settings were found with"
            )
        factor = self.stepped_batch_size / optimizer.tuned_batch_size
        least = min(optimizer.beta1, optimizer.beta2)
        if optimizer.batch_rule == "sqrt" and optimizer.kind == "adamw" and factor * (1.0 - least) > 1.0:
            most = int(optimizer.tuned_batch_size / (1.0 - least))
            raise ValueError(
                f"a step's batch ({self.stepped_batch_size}) is more than what optimizer.batch_rule "
                f'"sqrt" can carry settings over to from tuned_batch_size ({optimizer.tuned_batch_size}): a '
                f"beta of {least:g} would become negative; lower it to {most}, or tune at a larger batch"
            )


# -- the peer ------------------------------------------------------------------------------------------------


Hours = Annotated[tuple[Annotated[str, Field(max_length=60)], ...], Field(strict=False, max_length=32)]


class Limits(Section):
    """What a peer may take of its machine, and when. While one of these says no, it is paused: what it has
    computed goes into the round under way, and nobody waits for it."""

    memory_megabytes: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Most memory that this peer may need; a run that needs more is refused before it begins. 0: what is
    free."""

    upload_mbit: Annotated[float, Field(ge=0, le=1_000_000)] = 0.0
    """Megabits per second that this peer sends, gradients and state together; 0: no limit. The others are
    told, and give it a smaller span. Setting it low will make everyone's rounds longer all the same, as its
    gradient must be sent; over a slow link, a run with a smaller codec suits better."""

    download_mbit: Annotated[float, Field(ge=0, le=1_000_000)] = 0.0
    """Megabits per second that this peer receives; 0: no limit. As with `upload_mbit`, all wait for it."""

    schedule: Annotated[
        tuple[Annotated[str, Field(max_length=60)], ...], Field(strict=False, max_length=32)
    ] = ()
    """When to train, by the local clock: `22:00-07:00`, or `mon-fri 18:30-08:00` and `sat,sun 00:00-24:00`
    (one text for each; the days are those on which it begins). Empty: always."""

    on_battery: Literal["pause", "train"] = "pause"
    """What to do while this machine runs on its battery."""

    only_when_idle: bool = False
    """Whether to train only while nobody uses this machine, as systemd-logind knows it; where there is no
    logind, while nothing else waits for a processor."""

    other_cpu_percent: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Pause while other programs take more than this share of all processors for 10 s, until they take less
    than three quarters of it; 0: never."""

    temperature_celsius: Annotated[float, Field(ge=0, le=150)] = 0.0
    """Pause while a sensor of the processor is hotter, until it is 5 degrees cooler than this; 0: never."""

    @property
    def bytes_per_second(self) -> float:
        """What may go both ways at once, as a round needs it; 0: no limit."""
        given = [mbit for mbit in (self.upload_mbit, self.download_mbit) if mbit]
        return min(given, default=0.0) * 1e6 / 8

    @model_validator(mode="after")
    def _schedule_opens(self) -> Self:
        for entry in self.schedule:
            timetable.parse(entry)
        return self


class PeerConfig(Section):
    """A peer file: how this machine takes part. No other peer needs to agree with it."""

    name: Annotated[str, Field(max_length=64)] = ""
    """What others see beside this peer's id, on the monitor for instance. Empty: a name made from the id."""

    data_dir: Annotated[str, Field(max_length=4096)] = ""
    """Folder for this peer's key, checkpoints and journal. Empty: p2ptrain's folder in your user data. Two
    peers on one machine need two."""

    micro_batch_size: MicroBatchSize = "auto"
    """Samples per forward and backward pass, at most the run's `target_batch_size`; fewer, while a pass of so
    many takes longer than the swarm's step. `auto` tries 1, 2, 4, … at the start, up to half of the target,
    and takes the smallest that is as fast as any and fits the memory. Setting it high will need more memory
    and make the others wait for a slow machine; setting it low will compute less efficiently."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads for computing. Setting it to the number of cores will make the machine sluggish for its
    owner and the peer slow to answer."""

    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|(cuda|mps|xpu)(:\d{1,2})?)$", max_length=7, examples=["cuda:0"])
    ] = "auto"
    """Where gradients are computed: `cpu`, `cuda` (also AMD's), `mps` (Apple's), `xpu` (Intel's), with a
    number if there are several, such as `cuda:1`. `auto` takes the first of the others that works, else the
    CPU. Parameters and optimizer state stay on the CPU, so peers of all kinds train together."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """How precisely: `fp32`, or multiplying in `bf16` or `fp16` and adding up in fp32, which is faster where
    the device has instructions for it, and refused elsewhere. `auto` is fp32 on the CPU; on others bf16 if
    they have it, else fp16."""

    compile: bool = False
    """Whether `torch.compile` compiles the model, which takes a minute or so at the start and needs a C++
    compiler. Setting it to true, for a large model on an accelerator, will compute up to twice as fast."""

    corpus: Annotated[str, Field(max_length=4096)] = ""
    """Text file, or folder of text files, to train on in place of the run's `task.corpus`; needed unless that
    is `stdlib`. Everyone gets a model that has read this text and may repeat it: name nothing private. Runs
    of a `causal_lm` take JSON lines and Parquet, too, for their `task.dataset`."""

    model: Annotated[str, Field(max_length=4096)] = ""
    """Folder with the model that a `causal_lm` run starts from, in place of the run's `task.model`; needed
    where that is only a name."""

    tokenizer: Annotated[str, Field(max_length=4096)] = ""
    """Folder with the tokenizer of a `causal_lm` run, in place of the run's `task.tokenizer`; needed where
    that is only a name."""

    allow_tasks: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$", max_length=100, examples=["package"])], ...],
        Field(strict=False, max_length=16),
    ] = ()
    """Python packages whose code runs with kind `own` may run here, by the names they are imported by. Such
    code can do whatever you can do on this machine: allow a package only if you trust its author."""

    listen: Addresses = ("/ip4/0.0.0.0/tcp/0",)
    """Addresses to accept peers on. Port 0 takes any free port, which changes at each start: set one to open
    it in your router."""

    announce: Addresses = ()
    """Addresses to tell other peers in place of those in `listen`, for a machine behind a forwarded port. A
    wrong one makes this peer unreachable."""

    data_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port to take gradients on, at the addresses in `listen` or `announce`. 0 takes any free port, which
    changes at each start: set one to open it in your router. Where no connection can be made either way,
    gradients go over the slower connection that peers have anyway."""

    reduces: bool = True
    """Whether this peer adds up its span of everybody's gradients, as all do. Setting it to false, on a
    machine that others can hardly reach or whose upload is needed, will make it a client: it sends its
    gradient and receives the average, and exchanges nothing with other clients. Where nobody reduces, all
    do."""

    relay_for: Annotated[int, Field(ge=0, le=128)] = 0
    """How many peers behind NAT this one passes traffic on for, when they have something for each other; 0:
    none. Set it on a machine that others can open connections to. It costs upload and download, as much as
    those peers exchange among themselves, and nothing else limits that."""

    metrics_host: Annotated[str, Field(max_length=255)] = "127.0.0.1"
    """Address to serve metrics and health on. `0.0.0.0` will show them to all who can reach this machine."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of metrics and health; 0 takes any free port, which the log names."""

    page: bool = False
    """Whether the web page of the run is served there, too. It asks the other peers only while somebody has
    it open."""

    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Where the figures of each step go beside the metrics page: `trackio` keeps them on this machine,
    `wandb` sends them to the account that you are logged in to, `tensorboard` writes files into `data_dir`.
    Each needs the extra of its name, as in `p2ptrain[trackio]`."""

    checkpoint_every_steps: Annotated[int, Field(ge=0, le=10**9)] = 200
    """Steps between two checkpoints on disk; 0 for none. Setting it high will lengthen the catch-up after a
    restart; setting it low will write the whole state, three times the model, that often."""

    checkpoints_kept: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many of the newest checkpoints stay on disk."""

    log_megabytes: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Megabytes of past entries kept for peers that missed some steps. Setting it low will make them download
    a whole snapshot instead."""

    donor_upload_mbit: Annotated[float, Field(ge=0, le=1_000_000)] = 0.0
    """Megabits per second that this peer gives to newcomers' downloads, all of them together. 0: a quarter of
    what its uplink is seen to carry in rounds. Setting it high will slow down everyone's rounds while
    somebody joins; setting it low will make newcomers wait."""

    eval_every_steps: Annotated[int, Field(ge=0, le=10**9)] = 50
    """Steps between two looks at the held-out loss; 0 for none. Setting it low takes time from training."""

    limits: Limits = Limits()
    """What this peer may take of its machine, and when."""


# -- reading -------------------------------------------------------------------------------------------------


def load(model: type[S], path: Path | str) -> S:
    """What this TOML file says, as that kind of table; what it leaves out has its default. Raises
    ConfigError."""
    return _validated(model, _read_toml(Path(path)), str(path))


def load_run(path: Path | str) -> RunConfig:
    """The run that this TOML file describes; what it leaves out has its default. Raises ConfigError."""
    return load(RunConfig, path)


def load_peer(path: Path | str) -> PeerConfig:
    """The peer settings in this TOML file; what it leaves out has its default. Raises ConfigError."""
    return load(PeerConfig, path)


def with_settings(peer: PeerConfig, settings: dict[str, Any], where: str) -> PeerConfig:
    """The peer settings with these keys, which may be dotted, set anew; `where` they come from is for the
    error. Raises ConfigError."""
    document = peer.model_dump(exclude_unset=True)
    for key, value in settings.items():
        *tables, name = key.split(".")
        table = document
        for each in tables:
            table = table.setdefault(each, {})
        table[name] = value
    return _validated(PeerConfig, document, where)


def load_either(path: Path | str) -> RunConfig | PeerConfig:
    """The run or the peer settings in this TOML file: its keys tell which. Raises ConfigError."""
    document = _read_toml(Path(path))
    for_peer = sum(key in PeerConfig.model_fields for key in document)
    for_run = sum(key in RunConfig.model_fields for key in document)
    if for_peer > for_run:
        return _validated(PeerConfig, document, str(path))
    return _validated(RunConfig, document, str(path))


def parse_run(text: str | bytes) -> RunConfig:
    """The run that a peer sent as JSON (see `canonical_json`). Raises BadMessage."""
    if len(text) > MAX_FILE_BYTES:
        raise BadMessage(f"a peer sent a run of {len(text)} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        reason = _sentence(RunConfig, error, "the run that a peer sent")
        raise BadMessage(f"{reason}; if the swarm runs a newer p2ptrain, upgrade this one") from None


def check_together(run: RunConfig, peer: PeerConfig) -> None:
    """Raises ConfigError if this peer cannot take part in this run as it is configured.

    A run's corpus other than `stdlib` is only a name here. Were it opened as a path, whoever writes an invite
    could have volunteers train on their private files, and read those back from the model.
    """
    if peer.micro_batch_size != "auto" and peer.micro_batch_size > run.target_batch_size:
        raise ConfigError(
            f"target_batch_size ({run.target_batch_size}) of run {run.run_id} is smaller than this peer's "
            f"micro_batch_size ({peer.micro_batch_size}); lower micro_batch_size in the peer file"
        )
    check_names(run, peer)


def check_names(run: RunConfig, peer: PeerConfig) -> None:
    """Raises ConfigError if the run names something that the peer file must give a place, and it does not."""
    for key, name in run.task.names.items():
        if not getattr(peer, key):
            raise ConfigError(
                f"run {run.run_id} wants the {key} {_shown(name)}, and p2ptrain opens no path that another "
                f"peer wrote; set {key} in the peer file to the file or folder where you have that {key}"
            )


# -- identity ------------------------------------------------------------------------------------------------


def canonical_json(run: RunConfig) -> str:
    """The run as ASCII JSON, all defaults spelled out, keys sorted, no spaces: equal runs, equal text."""
    return _canonical(run.model_dump(mode="json"))


def run_digest(run: RunConfig) -> str:
    """Hex SHA-256 of the canonical JSON: names the run file in invites and checkpoints."""
    return hashlib.sha256(canonical_json(run).encode()).hexdigest()


def fingerprint(
    run: RunConfig, parameters: Sequence[tuple[str, tuple[int, ...], str]], base_digest: str = ""
) -> str:
    """Hex SHA-256 of the run, the protocol, each trained parameter's (name, shape, dtype), in order, and the
    digest of what they are adapters for, if they are adapters.

    Peers of different fingerprints never meet. The order counts: it is the order of the averaged vector's
    values.
    """
    bound = {
        "protocol": PROTOCOL_VERSION,
        "run": run.model_dump(mode="json"),
        "parameters": [[name, list(shape), dtype] for name, shape, dtype in parameters],
        "base": base_digest,
    }
    return hashlib.sha256(_canonical(bound).encode()).hexdigest()


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """Where two runs differ, as `optimizer.lr: 0.002 here, 0.001 there`; empty if their digests agree."""
    here, there = _leaves(a), _leaves(b)
    keys = dict.fromkeys([*here, *there])
    return [
        f"{key}: {here.get(key, 'nothing')} here, {there.get(key, 'nothing')} there"
        for key in keys
        if here.get(key) != there.get(key)
    ]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _leaves(section: Section, prefix: str = "") -> dict[str, str]:
    """Dotted key → value as JSON, sections resolved, in the order of the fields."""
    leaves: dict[str, str] = {}
    for name, value in section:
        if isinstance(value, Section):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = _canonical(value)
    return leaves


# -- documentation -------------------------------------------------------------------------------------------


def schema() -> dict[str, dict[str, Any]]:
    """The JSON schemas of the `run` and the `peer` file."""
    return {"run": RunConfig.model_json_schema(), "peer": PeerConfig.model_json_schema()}


def explain(key: str) -> str:
    """What a dotted key of either file takes, its default and what it does; once for each kind of task in
    which it means something else. Raises ConfigError if unknown."""
    for model in (RunConfig, PeerConfig):
        told: dict[str, list[str]] = {}
        for kind in KINDS:
            if key in _keys(model, kind):
                told.setdefault(_explained(key, _keys(model, kind)), []).append(kind)
        if told:
            return "\n\n".join(
                f"{key} ({_file(model)}{'' if len(kinds) == len(KINDS) else _of(kinds)}): {text}"
                for text, kinds in told.items()
            )
    raise ConfigError(f"there is no key {_shown(key)}{_nearest(key, RunConfig)}")


def _of(kinds: Sequence[str]) -> str:
    return f", task.kind {' or '.join(kinds)}"


def _explained(key: str, keys: dict[str, dict[str, Any]]) -> str:
    about = keys[key]
    inside = ", ".join(each.removeprefix(f"{key}.") for each in keys if each.startswith(f"{key}."))
    takes = f"a table of {inside}" if inside else f"{_wanted(about)}; default {_canonical(about['default'])}"
    return f"{takes}\n{_wrapped(about['description'])}"


def commented_toml(config: RunConfig | PeerConfig) -> str:
    """A TOML file of this config with every key spelled out under its documentation."""
    about = _keys(type(config), config.task.kind if isinstance(config, RunConfig) else KINDS[0])
    blocks = [_wrapped(type(config).__doc__ or "", "# ")]
    table = ""
    for key, value in _leaves(config).items():
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            blocks.append(f"[{table}]")
        line = f"{name} = {_toml(json.loads(value))}"
        blocks.append(f"{_wrapped(about[key]['description'], '# ')}\n{line}")
    return "\n\n".join(blocks) + "\n"


def _toml(value: object) -> str:
    """JSON spells texts, numbers, booleans and lists of texts as TOML does, DEL apart."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _wrapped(text: str, margin: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), width=100, initial_indent=margin, subsequent_indent=margin)


# -- errors as sentences -------------------------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes, so it is no run or peer file")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows put a mark before the text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _validated(model: type[S], document: dict[str, Any], where: str) -> S:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_sentence(model, error, where)) from None


def _sentence(model: type[Section], error: ValidationError, where: str) -> str:
    """The first thing that is wrong, in words, and how many more there are.

    Unknown keys come first: a mistyped key is often what the other complaints come from.
    """
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    kind, loc = _untagged(problem["loc"])
    key = _dotted(loc)
    match problem["type"]:
        case "union_tag_invalid":
            known = " or ".join(map(_canonical, KINDS))
            text = f"task.kind in {where} must be {known}, but is {_shown(_kind_of(problem['input']))}"
        case "extra_forbidden":
            text = f"unknown key {_shown(key)} in {where}{_nearest(key, model)}"
        case "value_error":
            text = f"{where}: {problem['ctx']['error']}"
        case "json_invalid":
            text = f"{where} is not JSON: {problem['ctx']['error']}"
        case _:
            place = f"{key} in {where}" if key else where
            wanted = _wanted_at(model, loc, kind)
            text = f"{place} must be {wanted}, but is {_shown(problem['input'])}"
    return text if len(problems) == 1 else f"{text} (1 of {len(problems)} problems)"


def _untagged(loc: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """The kind of task that pydantic puts into the place of an error, and the place as the file has it."""
    match loc:
        case ("task", str(kind), *rest) if kind in KINDS:
            return kind, ("task", *rest)
    return KINDS[0], loc


def _dotted(loc: tuple[int | str, ...]) -> str:
    """("task", "width") → task.width, ("listen", 0) → listen[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _shown(value: object) -> str:
    """A value as its file would spell it, short and printable whoever wrote it."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "an integer beyond 64 bits"  # Python refuses to print those of thousands of digits
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _nearest(key: str, model: type[Section]) -> str:
    """The known key of this file, or of run and peer file, that `key` may have meant, as the end of a
    sentence."""
    either: tuple[type[Section], ...] = (RunConfig, PeerConfig)
    owners = sorted(either, key=lambda each: each is model) if model in either else [model]
    known = {
        each: _file(owner) for owner in owners for kind in reversed(KINDS) for each in _keys(owner, kind)
    }
    key = key[:80]  # comparing takes time in proportion, and the key may be a stranger's
    leaf = key.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio())

    best = max(known, key=likeness)
    if likeness(best) < 0.6:
        return "; `p2ptrain config schema` lists all keys" if model in either else ""
    if best == key:
        place = "of another task.kind" if known[best] == _file(model) else f"in the {known[best]}"
        return f"; it belongs in a table {place}" if "." in key else f"; it belongs {place}"
    return f"; the nearest known key is {best} of the {known[best]}"


def _file(model: type[Section]) -> str:
    return {RunConfig: "run file", PeerConfig: "peer file"}.get(model, "file")


@cache
def _keys(model: type[Section], kind: str) -> dict[str, dict[str, Any]]:
    """Dotted key → its JSON schema, for each key and section of a file with this kind of task."""
    whole = model.model_json_schema()
    keys: dict[str, dict[str, Any]] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, about in node["properties"].items():
            keys[prefix + name] = about
            about = about.get("items", about)  # of a list of tables, one of these
            for choice in about.get("oneOf", [about]):
                if "$ref" in choice:
                    inner = whole["$defs"][choice["$ref"].rpartition("/")[2]]
                    if "oneOf" not in about or inner["properties"]["kind"]["const"] == kind:
                        walk(inner, f"{prefix}{name}.")

    walk(whole, "")
    return keys


def _wanted_at(model: type[Section], loc: tuple[int | str, ...], kind: str) -> str:
    if not loc:
        return "a table of keys"
    about = _keys(model, kind)[_dotted(tuple(part for part in loc if isinstance(part, str)))]
    return _wanted(about["items"] if isinstance(loc[-1], int) else about)


def _wanted(about: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    match about:
        case {"anyOf": choices}:
            return " or ".join(map(_wanted, choices))
        case {"const": only}:
            return _canonical(only)
        case {"enum": choices}:
            return " or ".join(map(_canonical, choices))
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer"}:
            return f"a whole number{_range(about)}"
        case {"type": "number"}:
            return f"a number{_range(about)}"
        case {"type": "string", "pattern": pattern}:
            example = about.get("examples", [about.get("default")])[0]
            return f"text like {_canonical(example)} (pattern {pattern})"
        case {"type": "string"}:
            return f"text of {about.get('minLength', 0)} to {about['maxLength']} characters"
        case {"type": "array"}:
            return f"a list of at most {about['maxItems']} entries, each {_wanted(about['items'])}"
        case {"additionalProperties": _}:
            return "a table of texts, numbers, true and false"
        case _:
            return "a table of keys"


def _range(about: dict[str, Any]) -> str:
    match about:
        case {"minimum": low, "maximum": high}:
            return f" from {low} to {high}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return ", " + " and ".join(f"{said} {about[bound]}" for bound, said in words.items() if bound in about)
