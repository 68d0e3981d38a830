"""Keys of a config.json that `read_config_json` does not use: which of them are accepted."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.checkpoints.tensors import CheckpointError

log = logging.getLogger(__name__)

READ = frozenset(
    """
    architectures attention_bias head_dim hidden_act hidden_size initializer_range
    intermediate_size max_position_embeddings mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings partial_rotary_factor
    quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    vocab_size
    """.split()  # noqa: SIM905
)
# Keys that change the computation and are not supported, with the values beside null that change
# nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "pruned_heads": ({},),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "rotary_pct": (1.0,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
# Keys about loading, training, generation and labels, which transformers writes or others add.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    assistant_early_exit attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length no_repeat_ngram_size num_assistant_tokens num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


def check_keys(raw: Mapping[str, Any], file: Path) -> None:
    """Warns of each key that is in none of the lists.

    Raises CheckpointError for a key that would change the computation.
    """
    for key, value in raw.items():
        if key in NEUTRAL:
            if value is not None and value not in NEUTRAL[key]:
                raise CheckpointError(
                    f"{file}: {key} is {value!r}, which changes the computation and is not "
                    "supported: use a checkpoint in which it is null"
                )
        elif key not in READ | HARMLESS:
            log.warning("%s: key %r is unknown and ignored", file, key)
