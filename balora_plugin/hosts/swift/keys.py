"""Every key of `swift sft`, and what becomes of it beside `tuner_type: ba_lora`; data alone.

docs/swift.md lists what is not plainly passed, and integration/test_swift.py holds these tables against the argument
classes of the ms-swift that is installed: a key that is new there has to be put into one of them.
"""

from __future__ import annotations

from typing import NamedTuple


class ArgumentRefusal(NamedTuple):
    """Why a key is refused, what to write instead, and whether that trains something else.

    `values`: the values that are refused; empty: every one that is set.
    """

    why: str
    remedy: str
    changes_training: bool | None
    values: tuple[object, ...] = ()


_LOSS = ArgumentRefusal("replaces the loss that the terms are a part of", "remove it", True)
_OTHERS = "is read by ms-swift's own tuners alone, and would be ignored here"
_BASE = ArgumentRefusal("trains or changes base parameters that the teacher shares", "remove it", True)
_SPLIT = ArgumentRefusal("is not supported with BA-LoRA yet", "use NPROC_PER_NODE (DDP), or deepspeed", False)

REFUSED: dict[str, ArgumentRefusal] = {
    "tuner_backend": ArgumentRefusal(
        "reads lora_A and lora_B past the layer's forward, so that nothing would train",
        "write tuner_backend: peft",
        False,
        ("unsloth",),
    ),
    "use_swift_lora": ArgumentRefusal(_OTHERS, "remove it", False),
    "lora_bias": ArgumentRefusal("trains biases of the base, which the teacher shares", "write none", True, ("all",)),
    "lora_dtype": ArgumentRefusal(_OTHERS, "remove it (the factors are float32 over a base in half precision)", None),
    "lorap_lr_ratio": ArgumentRefusal(_OTHERS, "remove it", True),
    "use_dora": ArgumentRefusal("is another adapter", "remove it", True),
    "trainable_parameters": ArgumentRefusal("is read in full fine-tuning alone", "write modules_to_save", None),
    "trainable_parameters_regex": ArgumentRefusal("is read in full fine-tuning alone", "write modules_to_save", None),
    "new_special_tokens": ArgumentRefusal(
        "appends random rows to embeddings and head, others in every run, which the teacher reads too",
        "use tokens that are there, or name a model that was saved with them",
        True,
    ),
    "enable_dft_loss": _LOSS,
    "enable_channel_loss": ArgumentRefusal("logs per-token losses that are never made here", "remove it", False),
    "loss_type": _LOSS,
    "use_galore": ArgumentRefusal("projects gradients of whole weights, which do not train here", "remove it", True),
    "lisa_activated_layers": _BASE,
    "optimizer": ArgumentRefusal(
        "needs ms-swift's own tuners, or clips the base's weights",
        "remove it, or write muon or multimodal",
        True,
        ("lorap", "galore", "muonclip"),
    ),
    "predict_with_generate": ArgumentRefusal(
        "evaluates by generated text, of which no term is measured", "remove it, and generate with swift infer", False
    ),
    "quant_method": ArgumentRefusal(
        "stores weights in a form that A0 and B0 cannot be taken from",
        "write quant_method: bnb with quant_bits: 4 or 8, or remove it",
        True,
        ("hqq", "eetq", "quanto", "fp8", "awq", "gptq", "gptq_v2", "aqlm"),
    ),
    "sequence_parallel_size": _SPLIT,
    "deepspeed_autotp_size": _SPLIT,
    "use_ray": _SPLIT,
    "use_flash_ckpt": ArgumentRefusal("saves in parts that are no adapter", "remove it", False),
    "safe_serialization": ArgumentRefusal(
        "saves by pickle, and adapters are safetensors", "remove it", False, (False,)
    ),
    "mrl_dims": ArgumentRefusal("is for embedding models, which BA-LoRA does not train", "remove it", True),
}
NOT_ONE = ("sequence_parallel_size", "deepspeed_autotp_size")  # sizes, of which 1 is none

# key -> what takes its place
SUPERSEDED: dict[str, str] = {
    "use_logits_to_keep": "the loss here never makes the logits of positions that do not count",
    "acc_strategy": "token_acc, the share of tokens: predictions are counted token by token",
    "use_liger_kernel": "Liger's layers are used; the loss here never makes full logits either",
}

# key -> what it becomes
MAPPED: dict[str, str] = {
    "tuner_type": "ba_lora; what is saved says lora",
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules, all-linear and all-embedding as ms-swift expands them",
    "target_regex": "target_modules",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save, all-embedding and all-norm as ms-swift expands them",
    "freeze_llm": "what all-linear leaves out of a multimodal model",
    "freeze_vit": "what all-linear leaves out of a multimodal model",
    "freeze_aligner": "what all-linear leaves out of a multimodal model",
    "use_rslora": "use_rslora",
    "init_weights": "init_lora_weights: true (the default) and pissa are PiSSA, pissa_niter_n is pissa_fast, lora the "
    "ordinary start",
    "task_type": "causal_lm has the NLG terms, seq_cls the NLU terms",
    "loss_scale": "weights of the task term, token by token",
    "router_aux_loss_coef": "the coefficient of the routers' loss",
    "resume_only_model": "a fresh optimizer",
    "resume_from_checkpoint": "the checkpoint's four factors, bit for bit",
    "adapters": "a saved BA-LoRA adapter to go on from",
}

# what ms-swift reads for another tuner or another kind of training alone: not read, as beside `tuner_type: lora`
_UNREAD = """
    freeze_parameters freeze_parameters_regex freeze_parameters_ratio
    lora_ga_batch_size lora_ga_iters lora_ga_max_length lora_ga_direction lora_ga_scale lora_ga_stable_gamma
    fourier_n_frequency fourier_scaling boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout
    vera_rank vera_projection_prng_key vera_dropout vera_d_initial adapter_act adapter_length
    adalora_target_r adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT adalora_beta1 adalora_beta2
    adalora_orth_reg_weight llamapro_num_new_blocks llamapro_num_groups
    reft_layer_key reft_layers reft_rank reft_intervention_type reft_args
    galore_target_modules galore_rank galore_update_proj_gap galore_scale galore_proj_type galore_optim_per_parameter
    galore_with_embedding galore_quantization galore_proj_quant galore_proj_bits galore_proj_group_size
    galore_cos_threshold galore_gamma_proj galore_queue_size lisa_step_interval
    decision_drop_instructions decision_subsample_options decision_state_as_text decision_shuffle_fields
    ray_exp_name device_groups
    max_new_tokens temperature top_k top_p repetition_penalty num_beams stream stop_words logprobs top_logprobs
    structured_outputs_regex
"""
UNREAD = frozenset(_UNREAD.split())

# of ms-swift's own keys those that reach it as they are written; transformers' training arguments do too
_PASSED = """
    model model_type model_revision torch_dtype attn_impl experts_impl num_labels problem_type
    rope_scaling device_map max_memory max_model_len local_repo_path init_strategy model_kwargs enable_npu_model_patch
    quant_bits hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
    template system max_length truncation_strategy max_pixels agent_template norm_bbox use_chat_template padding_side
    padding_free is_binary_loss_scale template_backend response_prefix enable_thinking preserve_thinking
    add_non_thinking_prefix disable_ignore_empty_think
    dataset val_dataset cached_dataset cached_val_dataset split_dataset_ratio data_seed dataset_num_proc
    load_from_cache_file dataset_shuffle val_dataset_shuffle streaming interleave_prob stopping_strategy
    shuffle_buffer_size download_mode columns strict remove_unused_columns disable_auto_column_mapping model_name
    model_author custom_dataset_info packing packing_length packing_num_proc packing_strategy lazy_tokenize
    external_plugins custom_register_path load_args load_data_args use_hf hub_token ddp_timeout ddp_backend seed
    ignore_args_error add_version create_checkpoint_symlink check_model
    vit_gradient_checkpointing max_shard_size dataloader_multiprocessing_context train_dataloader_shuffle
    group_by_length max_epochs aligner_lr vit_lr ds3_gather_for_generation eval_metric callbacks early_stop_interval
    eval_use_evalscope eval_dataset eval_dataset_args eval_limit eval_generation_config extra_eval_args
    logging_dir warmup_ratio zero_hpz_partition_size
    swanlab_token swanlab_project swanlab_workspace swanlab_exp_name swanlab_notification_method swanlab_webhook_url
    swanlab_secret swanlab_sender_email swanlab_receiver_email swanlab_smtp_server swanlab_smtp_port
    swanlab_email_language swanlab_mode
"""
PASSED = frozenset(_PASSED.split())
