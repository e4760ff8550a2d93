"""config.json -> which layers are MoE layers, how large a shared expert is, what stands between the projections.

Defaults are those of transformers. Functions raise ValueError with one sentence for what cannot be served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moeserve.checkpoints.family import ACTIVATIONS, hidden_act
from moeserve.checkpoints.keys import Config, flag, indexes, kinds, lookup, must_be, number, one_of, shown, whole
from moeserve.config import LIMITED, Activation, Mixing, parsed_activation


def sparse_step(config: Config, index: int) -> bool:
    """Every `decoder_sparse_step`-th layer, except those in `mlp_only_layers`: Qwen."""
    return index not in (indexes(config, "mlp_only_layers") or ()) and (index + 1) % whole(config, "decoder_sparse_step", 1) == 0


def flint(config: Config, index: int) -> bool:
    """Unless it says otherwise, the first two layers are dense."""
    dense = config.get("mlp_only_layers")
    return sparse_step({**config, "mlp_only_layers": [0, 1] if dense is None else dense}, index)


def after_dense(default: int, key: str = "first_k_dense_replace") -> Callable[[Config, int], bool]:
    """The first layers are dense."""

    def is_moe_layer(config: Config, index: int) -> bool:
        return index >= whole(config, key, default, at_least=0)

    return is_moe_layer


def of_kind(default: int) -> Callable[[Config, int], bool]:
    """`mlp_layer_types` names the kind of every layer, or `moe_layer_freq` has a 1 for those with experts.

    Without them the first layers are dense; a number as `moe_layer_freq` makes only every n-th of the others an MoE layer.
    """

    def is_moe_layer(config: Config, index: int) -> bool:
        named, frequency = kinds(config, "mlp_layer_types", ("dense", "sparse")), config.get("moe_layer_freq", 1)
        if named:
            return named[index] == "sparse"
        if not isinstance(frequency, list):
            return after_dense(default)(config, index) and index % whole(config, "moe_layer_freq", 1) == 0
        count = whole(config, "num_hidden_layers")
        if len(frequency) < count or any(one not in (0, 1) for one in frequency):
            raise must_be(config, "moe_layer_freq", f"a positive whole number, or a list of 0 or 1 for each of the {count} layers")
        return bool(frequency[index])

    return is_moe_layer


def gemma4(config: Config, index: int) -> bool:
    """All layers or none."""
    return flag(config, "enable_moe_block", False)


def nemotron(config: Config, index: int) -> bool:
    """By a word for each layer, or a letter."""
    words, letters = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    if words is not None and not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise must_be(config, "layers_block_type", "a list of a word for each layer")
    if words is not None:
        return bool(words[index] == "moe")
    if not (isinstance(letters, str) and letters):
        raise must_be(config, "hybrid_override_pattern", "text with a letter for each layer")
    return letters[index] == "E"


def inkling(config: Config, index: int) -> bool:
    """As the rule by kinds says; without kinds the first `dense_mlp_idx` layers are dense."""
    return of_kind(whole(config, "dense_mlp_idx", 0, at_least=0))(config, index)


def step(config: Config, index: int) -> bool:
    """As published, the numbers of the MoE layers with commas between them; kinds may be named of further layers than there are."""
    count, named, enum = whole(config, "num_hidden_layers"), config.get("mlp_layer_types"), config.get("moe_layers_enum")
    if named is not None or enum is None:
        return of_kind(3)({**config, "mlp_layer_types": named[:count] if isinstance(named, list) else named}, index)
    numbers = enum.split(",") if isinstance(enum, str) else enum
    if not isinstance(numbers, list) or not all(str(number).strip().isdecimal() for number in numbers):
        raise must_be(config, "moe_layers_enum", "numbers of layers with commas between them")
    return index in map(int, numbers)


def step_layer(config: Config, index: int) -> Config:
    """`swiglu_limits` has a limit for each layer, and maybe for layers that predict further tokens; 0 or null = none."""
    limits = {}
    for key, theirs in (("swiglu_limit", "swiglu_limits"), ("swiglu_limit_shared", "swiglu_limits_shared")):
        own = config.get(theirs)
        if own is not None and not (isinstance(own, list) and len(own) >= whole(config, "num_hidden_layers")):
            raise must_be(config, theirs, f"a list of one for each of the {config['num_hidden_layers']} layers")
        limits[key] = own[index] if own is not None else None
    return {**config, **limits}


def hash_layers(config: Config, index: int) -> Config:
    """DeepSeek-V4: the first layers, or those so named, look the experts of a token up by its id."""
    named = kinds(config, "mlp_layer_types", ("hash_moe", "moe"))
    is_hash = named[index] == "hash_moe" if named else index < whole(config, "num_hash_layers", 3, at_least=0)
    return {**config, "is_hash_layer": is_hash}


def inkling_layer(config: Config, index: int) -> Config:
    """With a width for dense layers, the usual one is that of the experts."""
    given = config.get("dense_intermediate_size") is not None
    return {**config, "moe_intermediate_size": whole(config, "intermediate_size")} if given else config


def every_nth(config: Config, index: int) -> bool:
    """Llama 4."""
    named = indexes(config, "moe_layers")
    return index in named if named is not None else (index + 1) % whole(config, "interleave_moe_layer_step", 1) == 0


def ernie(config: Config, index: int) -> bool:
    """Every `moe_layer_interval`-th layer between two given ones, -1 being the last."""
    start, end = whole(config, "moe_layer_start_index", 1, at_least=0), whole(config, "moe_layer_end_index", -1, at_least=-1)
    is_within = index >= start and (end == -1 or index <= end)
    return is_within and (index + 1) % whole(config, "moe_layer_interval", 1) == 0


def jamba(config: Config, index: int) -> bool:
    """One expert is a dense layer."""
    period, offset = whole(config, "expert_layer_period", 2), whole(config, "expert_layer_offset", 1, at_least=0)
    return index % period == offset and lookup(config, "num_experts") != 1


def times_expert(key: str, default: int) -> Callable[[Config], int]:
    """A shared expert as large as so many others; null = there is none."""

    def size(config: Config) -> int:
        is_null = key in config and config[key] is None
        return 0 if is_null else whole(config, "moe_intermediate_size") * whole(config, key, default, at_least=0)

    return size


def dots3_shared(config: Config) -> int:
    """dots 3: as wide as so many experts of a width of its own."""
    keys = ("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size")
    return whole(config, next((key for key in keys if key in config), keys[0]), 1536) * whole(config, "n_shared_experts", 1)


def of_its_own(config: Config) -> int:
    """The shared expert has a key for its width; 0 = there is none."""
    return whole(config, "shared_expert_intermediate_size", at_least=0)


def by_key(key: str) -> Callable[[Config], int]:
    """The width of the shared expert is at `key`; 0 = there is none."""
    return lambda config: whole(config, key, at_least=0)


def times_dense(key: str) -> Callable[[Config], int]:
    """As large as so many others, where these have the usual width."""
    return lambda config: whole(config, "intermediate_size") * whole(config, key, 0, at_least=0)


def like_the_others(config: Config) -> int:
    """The shared expert is as wide as the others."""
    return whole(config, "intermediate_size")


def limited(name: str, default: float, key: str = "swiglu_limit") -> Callable[[Config], Activation]:
    """An activation whose halves are clamped."""

    def activation(config: Config) -> Activation:
        hidden_act(config)
        limit = number(config, key, default)
        return name if limit == LIMITED[parsed_activation(name)[0]] else f"{name}({limit})"

    return activation


def step_activation(key: str) -> Callable[[Config], Activation]:
    """The usual ones, or SwiGLU with a limit after SiLU when `key` has one: Step 3.5."""

    def activation(config: Config) -> Activation:
        return limited("swiglu_post", 0.0, key)(config) if config.get(key) else hidden_act(config)

    return activation


def by_activation_key(key: str, default: str, supported: Mapping[str, Activation] = ACTIVATIONS) -> Callable[[Config], Activation]:
    """The activation is named at `key`, in the words of `supported`."""
    return lambda config: supported[one_of(config, key, tuple(supported), default)]


def silu(config: Config) -> Activation:
    """Always, for experts: Aria's `hidden_act` is about shared ones. Another is refused, see claims.py."""
    return "swiglu"


def cohere2_mixing(config: Config) -> Mixing:
    """The shared expert is added, or averaged with the others."""
    strategies: dict[str, Mixing] = {"average": "average", "sum": "add"}
    return strategies[one_of(config, "shared_expert_combination_strategy", tuple(strategies), "average")]


def gpt_oss_activation(config: Config) -> Activation:
    """Its own SwiGLU, of alpha = 1.702 and with a limit; `hidden_act` is not read."""
    if config.get("swiglu_alpha", 1.702) != 1.702:
        raise ValueError(f"swiglu_alpha is {shown(config['swiglu_alpha'])}; supported: 1.702")
    return limited("swigluoai", 7.0)({key: value for key, value in config.items() if key != "hidden_act"})


def dbrx_activation(config: Config) -> Activation:
    """SiLU, written as a table."""
    function = lookup(config, "ffn_config.ffn_act_fn") or {"name": "silu"}
    if function != {"name": "silu"}:
        raise ValueError(f'ffn_config.ffn_act_fn is {shown(function)}; supported: {{"name": "silu"}}')
    return "swiglu"
