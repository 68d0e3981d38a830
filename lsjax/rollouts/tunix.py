"""Rollouts for Tunix (google-tunix 0.1.7): pip install 'lsjax[tunix]'.

    engine = functools.partial(LayerSkipRollout, text=tokenizer, strategy=lsjax.Adaptive((2,)))
    config = ClusterConfig(rollout_engine=engine, ...)
    cluster = RLCluster(actor=Actor(model), tokenizer=TunixTokenizer(tokenizer),
                        cluster_config=config, ...)

Tunix trains `Actor`, whose layers are stacked. The rollouts decode with the same arrays: what they
copy on a mesh is a slice for each layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from tunix.rl import reshard
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from lsjax.config import MeshConfig, Sampling
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.strategy import Strategy
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.rollouts.engine import Rollouts, padded
from lsjax.rollouts.log_probs import last_states, token_log_probs
from lsjax.sharding import make_mesh

COPIES = MeshConfig(data=-1)  # of the policy, one on each device


class TunixTokenizer:
    """A tokenizer as Tunix calls it. pad_id: token of padding, which no text may contain."""

    def __init__(self, text: Tokenizer, pad_id: int = 0):
        self._text, self._pad_id = text, pad_id

    def encode(self, text: str, **_: Any) -> list[int]:
        """Token ids, as the model's prompts have them."""
        return self._text.encode(text)

    def decode(self, ids: Any, **_: Any) -> str:
        """The text of token ids."""
        return self._text.decode([int(token) for token in ids])

    def bos_id(self) -> int | None:
        """The beginning-of-text token."""
        return self._text.bos_id

    def eos_id(self) -> int:
        """The first end token."""
        return self._text.eos_ids[0]

    def pad_id(self) -> int:
        """The token of padding."""
        return self._pad_id


class Actor(nnx.Module):
    """A Llama as Tunix calls its models: tokens, positions and a mask in, logits out."""

    def __init__(self, llama: Llama):
        self.llama = stacked(llama)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: None = None,
        attention_mask: Bool[Array, "B T T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], None]:
        """attention_mask: causal, with padding left out; its last row says what padding is."""
        if segment_ids is None:
            mask_BT = jnp.ones_like(tokens) if attention_mask is None else attention_mask[:, -1]
            segment_ids = mask_BT.astype(jnp.int32)
        batch = {"tokens_BT": tokens, "positions_BT": positions, "segments_BT": segment_ids}
        return self.llama.unembed(last_states(self.llama, batch)), cache


class LayerSkipRollout(BaseRollout):
    """Tunix's rollout engine that drafts with the policy's own exits.

    text: the tokenizer. strategy, batch_size: as of `Rollouts`. decoding: how the rollouts use the
    devices of Tunix's mesh, by default as copies of the policy. Other arguments are Tunix's.
    """

    def __init__(
        self,
        *,
        rollout_actor: Actor,
        tokenizer: Any,
        rollout_config: RolloutConfig,
        text: Tokenizer,
        strategy: Strategy | None = None,
        batch_size: int = 8,
        decoding: MeshConfig = COPIES,
        mesh: Mesh | None = None,
        **_: Any,
    ):
        self._actor, self._tokenizer, self._calls = rollout_actor, tokenizer, 0
        several = mesh is not None and mesh.size > 1
        self._rollouts = Rollouts(
            unstacked(rollout_actor.llama),
            text,
            strategy,
            batch_size=batch_size,
            pad_id=tokenizer.pad_id(),
            mesh=make_mesh(decoding, mesh.devices.flatten().tolist()) if several else None,
        )

    def generate(
        self, prompts: list[str], rollout_config: RolloutConfig, **_: Any
    ) -> RolloutOutput:
        """A text for each prompt. Log-probabilities are after the temperature. Long prompts lose
        their beginning."""
        self._rollouts.use(unstacked(self._actor.llama))
        config, self._calls = rollout_config, self._calls + 1
        ids = [self._rollouts.engine.tokenizer.encode(prompt) for prompt in prompts]
        ids = [own[-config.max_prompt_length :] for own in ids]
        key = jax.random.key(0) if config.seed is None else config.seed
        key = jax.random.fold_in(key, self._calls)
        sampling = Sampling(
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=max(0, config.top_k or 0),
            seed=int(jax.random.bits(key)) if config.temperature else 0,
        )
        batch = self._rollouts.generate(
            ids,
            max_new_tokens=config.max_tokens_to_generate,
            sampling=sampling,
            stop_ids=tuple(config.eos_tokens or ()),
        )
        # Tunix expects the same length in every call.
        longest = [[self.pad_id()] * config.max_prompt_length]
        prompts_RP, _ = padded([*ids, *longest], self.pad_id(), left=True)
        tokens = [np.array(one.token_ids) for one in batch.completions]
        logs = [np.array(one.log_probs, np.float32) for one in batch.completions]
        return RolloutOutput(
            text=batch.texts,
            logits=None,
            tokens=tokens,
            left_padded_prompt_tokens=prompts_RP[:-1],
            logprobs=logs if config.return_logprobs else None,
        )

    def get_per_token_logps(
        self,
        prompt_tokens: Int[Array, "R P"],
        completion_tokens: Int[Array, "R T"],
        completion_mask: Bool[Array, "R T"] | None = None,
    ) -> Float[Array, "R T"]:
        """Log-probabilities of the policy, before the temperature."""
        mask = completion_tokens != self.pad_id() if completion_mask is None else completion_mask
        given = prompt_tokens, prompt_tokens != self.pad_id(), completion_tokens, mask
        return jax.jit(token_log_probs)(self._actor.llama, *given)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes new weights. Those of another mesh are sent to this one."""
        if filter_types is not None:
            params = reshard.reshard_pytree(params, nnx.state(self._actor, filter_types))
        nnx.update(self._actor, params)

    def pad_id(self) -> int:
        """The token of padding."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """The first end token."""
        return self._tokenizer.eos_id()

    def model(self) -> Actor:
        """The policy."""
        return self._actor
