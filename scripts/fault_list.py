"""Sixty faults that measure how much the tests find; scripts/faults.py injects them.

A fault is silent: the program runs on, but with wrong numbers, other tokens or lost work. Each
changes an expression of its own, which its file contains once. FROM_DOCS was written from README.md
and docs/ before its author had seen any code or test; FROM_CODE was written from the code.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of the source, and the test files that probably find it, the fastest first."""

    name: str
    file: str  # below lsjax/
    right: str
    wrong: str
    tests: str


FROM_DOCS = (
    Fault(
        "masks repeat in every micro-batch",
        "training/step.py",
        "split_batch = split_rows((batch, rows_B), config.micro_batches)",
        "own_B = rows_B // config.micro_batches\n"
        "    split_batch = split_rows((batch, own_B), config.micro_batches)",
        "tests/training/test_step.py",
    ),
    Fault(
        "kept rows rounded down",
        "training/kept_rows.py",
        "return below_L + (draws_L < share_L)",
        "return below_L + (share_L >= 1)",
        "tests/training/test_kept_rows.py",
    ),
    Fault(
        "sampled tokens without their weight",
        "training/loss.py",
        "scales_EB = scales_EB.at[:-1].set(count_B / jnp.maximum(part_B, 1))",
        "scales_EB = scales_EB.at[:-1].set(1.0)",
        "tests/training/test_objective.py",
    ),
    Fault(
        "gradual curriculum at half speed",
        "training/early_exit.py",
        "first_step = -(-(num_layers - exits + 1) * num_steps // (2 * num_layers))",
        "first_step = -(-(num_layers - exits + 1) * num_steps // num_layers)",
        "tests/training/test_early_exit.py",
    ),
    Fault(
        "norms decay",
        "training/optimizer.py",
        'not name.endswith(("scale", "bias"))',
        'not name.endswith("bias")',
        "tests/training/test_step.py",
    ),
    Fault(
        "a skipped step changes the optimizer",
        "training/step.py",
        "unless_skipped(finite, new, (before, state.opt_state))",
        "unless_skipped(finite, new, (before, opt_state))",
        "tests/training/test_step.py",
    ),
    Fault(
        "adapters merged without their scale",
        "model/lora.py",
        "(kernel + scale * jnp.tensordot(",
        "(kernel + jnp.tensordot(",
        "tests/training/test_lora.py",
    ),
    Fault(
        "penalty raises negative logits",
        "decoding/sampling.py",
        "jnp.where(said_BTS > 0, said_BTS / penalty_B11, said_BTS * penalty_B11)",
        "said_BTS / penalty_B11",
        "tests/decoding/test_penalties.py",
    ),
    Fault(
        "top_p before top_k",
        "decoding/sampling.py",
        "weight_BTV = jnp.where(below_BTV <= limit_BT1, jnp.exp(-below_BTV), 0)",
        "weight_BTV = jnp.exp(-below_BTV)",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "log-probabilities after penalties",
        "decoding/acceptance.py",
        "log_probs_BT = state.log_probs(logits_BTV, changed_BTV, tokens_BT)",
        "log_probs_BT = state.log_probs(changed_BTV, changed_BTV, tokens_BT)",
        "tests/decoding/test_penalties.py",
    ),
    Fault(
        "seed of the row's last text",
        "decoding/programs.py",
        "lambda batch, one: lax.dynamic_update_slice_in_dim(batch, one, row, axis=0)",
        "lambda batch, one: batch if batch.dtype == jnp.uint32\n"
        "        else lax.dynamic_update_slice_in_dim(batch, one, row, axis=0)",
        "tests/decoding/test_run.py",
    ),
    Fault(
        "stop string across a token border",
        "decoding/completion.py",
        "self.text.find(stop, self._shown)",
        "self.text.find(stop, len(self.text) - len(piece))",
        "tests/decoding/test_completion.py",
    ),
    Fault(
        "cache of another history",
        "decoding/conversation.py",
        "return next((i for i in range(limit) if known[i] != ids[i]), limit)",
        "return limit",
        "tests/decoding/test_conversation.py",
    ),
    Fault(
        "rounds of an unsure exit",
        "decoding/completion.py",
        'f"exit {exit_layer}" if exit_layer else "lookup" if drafted else "none"',
        '"none" if not drafted else f"exit {exit_layer}" if exit_layer else "lookup"',
        "tests/decoding/test_completion.py",
    ),
    Fault(
        "label across the end of a document",
        "data/packing.py",
        "labelled[end - 1 : end] = False",
        "labelled[end - 1 : end] = end < len(tokens)",
        "tests/data/test_packing.py",
    ),
    Fault(
        "validation documents of the training data",
        "data/shards.py",
        'chosen = {"validation": new_N}',
        'chosen = {"validation": np.ones_like(new_N)}',
        "tests/data/test_pipeline.py",
    ),
    Fault(
        "all hosts read the first rows",
        "data/pipeline.py",
        "reader(numbers_B[own_B])",
        "reader(numbers_B[: len(own_B)])",
        "tests/data/test_pipeline.py",
    ),
    Fault(
        "best step is the newest",
        "checkpoints/run.py",
        "key=lambda step: (losses[step], -step)",
        "key=lambda step: -step",
        "tests/checkpoints/test_run.py",
    ),
    Fault(
        "biased pass@k",
        "evaluation/scores.py",
        "return 1 - math.comb(samples - passed, k) / math.comb(samples, k)",
        "return 1 - (1 - passed / samples) ** k",
        "tests/evaluation/test_tasks.py",
    ),
    Fault(
        "loop counted once",
        "aot/costs.py",
        'total.add(self._all(one, "condition", "body"), 1 if times is None else times)',
        'total.add(self._all(one, "condition", "body"))',
        "tests/aot/test_hlo.py",
    ),
)

FROM_CODE = (
    Fault(
        "exit off by one",
        "training/early_exit.py",
        "on = (exits - 1) % config.rotation",
        "on = exits % config.rotation",
        "tests/training/test_early_exit.py",
    ),
    Fault(
        "wrong rotation phase",
        "model/rope.py",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
        "tests/families/test_transformers.py",
    ),
    Fault(
        "unscaled micro-batch",
        "training/step.py",
        "return objective(*given, rows_B, num_labels, recipe)",
        "return objective(*given, rows_B, (part['labels_BT'] >= 0).sum(), recipe)",
        "tests/training/test_step.py",
    ),
    Fault(
        "stale cache slot",
        "kernels/cache_blocks.py",
        "seen_BRS = slots <= position_BR1",
        "seen_BRS = slots <= position_BR1 + 1",
        "tests/kernels/test_cached_attention.py",
    ),
    Fault(
        "unfiltered draft probabilities",
        "decoding/draft.py",
        "            log_q_B1W=log_q_B1W,",
        "            log_q_B1W=None if log_q_B1W is None else jax.nn.log_softmax(logits_B1W),",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "dropped label at a row's end",
        "data/packing.py",
        "labelled_BT = labelled[place_BT] & inside_BT",
        "labelled_BT = labelled[place_BT] & (np.arange(seq_len) < lengths_B[:, None] - 1)",
        "tests/data/test_packing.py",
    ),
    Fault(
        "wrong rope scaling",
        "model/rope.py",
        "(keep + (1 - keep) / scaling.factor)",
        "(keep + (1 - keep) * scaling.factor)",
        "tests/families/test_transformers.py",
    ),
    Fault(
        "lost optimizer state",
        "checkpoints/steps.py",
        "        return jax.tree.unflatten(",
        "        leaves = [a if a.ndim == 0 or 'opt_state' not in p else a * 0\n"
        "                  for p, a in zip(named_leaves(like), leaves, strict=True)]\n"
        "        return jax.tree.unflatten(",
        "tests/checkpoints/test_saving.py",
    ),
    Fault(
        "stop token inside a draft",
        "decoding/state.py",
        "count_B = jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B)",
        "count_B = jnp.minimum(count_B, room_B)",
        "tests/decoding/test_stops.py",
    ),
    Fault(
        "unsharded head",
        "model/parameters.py",
        'Parameter("head", "lm_head", "output", _TABLE)',
        'Parameter("head", "lm_head", "output")',
        "tests/test_sharding.py",
    ),
    Fault(
        "rates over L",
        "training/layer_dropout.py",
        "depth = np.arange(num_layers) / (num_layers - 1)",
        "depth = np.arange(num_layers) / num_layers",
        "tests/training/test_layer_dropout.py",
    ),
    Fault(
        "exponential schedule of base e",
        "training/layer_dropout.py",
        "return jnp.exp2(elapsed) - 1",
        "return jnp.expm1(elapsed)",
        "tests/training/test_layer_dropout.py",
    ),
    Fault(
        "weights normalised over all exits",
        "training/early_exit.py",
        "return relative_L / relative_L.sum()",
        "return relative_L / (layer_weights(config, num_layers) / weights_L[-1]).sum()",
        "tests/training/test_early_exit.py",
    ),
    Fault(
        "gradient of silu",
        "kernels/swiglu.py",
        "dy * up * (sigmoid + silu * (1 - sigmoid))",
        "dy * up * (sigmoid + silu * sigmoid)",
        "tests/kernels/test_operations.py",
    ),
    Fault(
        "gradients put back in another order",
        "training/head_loss.py",
        "back_BT = jnp.argsort(positions.order_EBT[entry], axis=1)",
        "back_BT = positions.order_EBT[entry]",
        "tests/training/test_head_loss.py",
    ),
    Fault(
        "packed documents see earlier ones",
        "kernels/self_attention.py",
        "mask_BTS &= segments_BT[:, :, None] == segments_BS[:, None]",
        "mask_BTS &= segments_BT[:, :, None] >= segments_BS[:, None]",
        "tests/training/test_forward.py",
    ),
    Fault(
        "resumes in the first epoch",
        "data/pipeline.py",
        'self._taken = state["rows_taken"]',
        'self._taken = state["rows_taken"] % len(self.rows)',
        "tests/data/test_pipeline.py",
    ),
    Fault(
        "stale tokens of another tokenizer",
        "data/token_rows.py",
        "*(tokenizer.fingerprint, tokenizer.add_bos,",
        "*(tokenizer.add_bos,",
        "tests/data/test_token_rows.py",
    ),
    Fault(
        "a chat begins twice",
        "data/chat.py",
        "self._tokenizer.encode(text.removeprefix(known), add_bos=False)",
        "self._tokenizer.encode(text.removeprefix(known))",
        "tests/data/test_dialogue.py",
    ),
    Fault(
        "replacement without the weight",
        "decoding/acceptance.py",
        "rest_BV = here(weight_BT[..., None]) * p_BV",
        "rest_BV = p_BV",
        "tests/decoding/test_acceptance.py",
    ),
    Fault(
        "p and q swapped",
        "decoding/acceptance.py",
        "of_tokens(log_p_BTW, index_BT) - of_tokens(draft.log_q_BTW, index_BT)",
        "of_tokens(draft.log_q_BTW, index_BT) - of_tokens(log_p_BTW, index_BT)",
        "tests/decoding/test_acceptance.py",
    ),
    Fault(
        "weights of a block above 1",
        "decoding/acceptance.py",
        "log_w_B = jnp.minimum(0, log_w_B + log_ratio_BT[:, t])",
        "log_w_B = log_w_B + log_ratio_BT[:, t]",
        "tests/decoding/test_acceptance.py",
    ),
    Fault(
        "rejected draft instead of its replacement",
        "decoding/draft.py",
        "is_draft_BT = jnp.arange(own_BT.shape[1]) < accepted_B[:, None]",
        "is_draft_BT = jnp.arange(own_BT.shape[1]) <= accepted_B[:, None]",
        "tests/decoding/test_acceptance.py",
    ),
    Fault(
        "draft vocabulary misaligned",
        "decoding/acceptance.py",
        "rest_BV.at[:, head.ids_W].add(-q_BW)",
        "rest_BV.at[:, : q_BW.shape[1]].add(-q_BW)",
        "tests/decoding/test_acceptance.py",
    ),
    Fault(
        "one random number for all draws of a round",
        "decoding/sampling.py",
        "len(Purpose) * offset + purpose",
        "int(purpose)",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "min_p before the temperature",
        "decoding/sampling.py",
        "-jnp.log(self.min_p_B)[:, None, None]",
        "-jnp.log(self.min_p_B)[:, None, None] / temperature_B11",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "verification forgets the draft's penalties",
        "decoding/acceptance.py",
        "changed_BTV = state.penalised(logits_BTV, 0, draft.tokens_BT)",
        "changed_BTV = state.penalised(logits_BTV)",
        "tests/decoding/test_penalties.py",
    ),
    Fault(
        "pending token counted as cached",
        "decoding/conversation.py",
        "[0, : int(state.length_B[0]) - 1]",
        "[0, : int(state.length_B[0])]",
        "tests/decoding/test_conversation.py",
    ),
    Fault(
        "window of the cache too wide",
        "kernels/cache_blocks.py",
        "seen_BRS & (slots > position_BR1 - self.window)",
        "seen_BRS & (slots >= position_BR1 - self.window)",
        "tests/kernels/test_cached_attention.py",
    ),
    Fault(
        "looked-up drafts count as sampled",
        "decoding/auto/adaptive.py",
        "log_q_BTW = jnp.where(is_token_BTW, 0, -jnp.inf)",
        "log_q_BTW = jnp.full_like(log_q_BTW, -math.log(size))",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "lookup drafts the matched token",
        "decoding/auto/lookup.py",
        "followed_BT = at_B[:, None] + 1 + jnp.arange(steps) % period_B1",
        "followed_BT = at_B[:, None] + jnp.arange(steps) % period_B1",
        "tests/decoding/test_lookup.py",
    ),
    Fault(
        "ideal speedup without the draft's head",
        "decoding/cost.py",
        "(drafts * (exit_layer + draft_head) + token)",
        "(drafts * exit_layer + token)",
        "tests/decoding/test_cost.py",
    ),
    Fault(
        "keys of a GGUF unpermuted by query heads",
        "checkpoints/gguf.py",
        'self.config.num_heads if interleaved[1] == "q" else self.config.num_kv_heads',
        "self.config.num_heads",
        "tests/checkpoints/test_gguf.py",
    ),
    Fault(
        "the oldest steps are kept",
        "checkpoints/saving.py",
        "steps[-self._config.keep_last :]",
        "steps[: self._config.keep_last]",
        "tests/checkpoints/test_saving.py",
    ),
    Fault(
        "lost save",
        "checkpoints/saving.py",
        "if step in self._manager.all_steps():",
        "if self._manager.all_steps():",
        "tests/checkpoints/test_saving.py",
    ),
    Fault(
        "norm of keys after rope",
        "model/block.py",
        "q, k = self.q_norm(q), self.k_norm(k)",
        "q = rope_kernel.rotate(self.q_norm(q), rope, rotate)\n"
        "        k, rope = self.k_norm(rope_kernel.rotate(k, rope, rotate)), None",
        "tests/families/test_decoding.py tests/families/test_transformers.py",
    ),
    Fault(
        "agreement with the labels",
        "evaluation/exits.py",
        "found = loss_LBT, token_LBT == token_LBT[-1]",
        "found = loss_LBT, token_LBT == labels_BT",
        "tests/evaluation/test_exits.py",
    ),
    Fault(
        "seen examples overlooked",
        "evaluation/tasks.py",
        "seen=own.prompt.strip() in known",
        "seen=own.prompt in known",
        "tests/evaluation/test_tasks.py",
    ),
    Fault(
        "a slice counts in full",
        "aot/traffic.py",
        'case "dynamic-slice" | "slice" | "gather" if index == 0:\n'
        "            return user.elements",
        'case "dynamic-slice" | "slice" | "gather" if index == 0:\n'
        "            return user.operands[0].elements",
        "tests/aot/test_traffic.py",
    ),
    Fault(
        "loss averaged over devices",
        "training/head_loss.py",
        "losses, dhead = jax.tree.map(lambda leaf: leaf.sum(0), sums)",
        "losses, dhead = jax.tree.map(lambda leaf: leaf.mean(0), sums)",
        "tests/long/test_eight_devices.py",
    ),
)

FAULTS = (*FROM_DOCS, *FROM_CODE)
