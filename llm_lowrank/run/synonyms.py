"""Other libraries' names of settings, and the names here."""

SYNONYMS = {  # other libraries' names -> ours
    **dict.fromkeys(("model", "base_model", "model_name", "model_path", "model_id"), "model_name_or_path"),
    **dict.fromkeys(("out", "output", "out_dir"), "output_dir"),
    **dict.fromkeys(("overwrite", "overwrite_output"), "overwrite_output_dir"),
    **dict.fromkeys(("r", "lora_r", "lora_rank", "lora_dim"), "method.rank"),
    **dict.fromkeys(("lora_alpha",), "method.alpha"),
    **dict.fromkeys(("lora_dropout",), "method.dropout"),
    **dict.fromkeys(("lora_target_modules", "lora_target", "lora_modules"), "method.target_modules"),
    **dict.fromkeys(("adapter", "peft_type", "finetuning_type", "tuner", "method_type"), "method.type"),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "per_device_batch_size"), "per_device_train_batch_size"
    ),
    **dict.fromkeys(("eval_batch_size", "per_gpu_eval_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("accumulation", "grad_accum", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("lr",), "learning_rate"),
    **dict.fromkeys(("optimizer",), "optim"),
    **dict.fromkeys(("lr_scheduler", "scheduler", "schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup",), "warmup_steps"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps"), "max_steps"),
    **dict.fromkeys(("clip", "grad_clip", "gradient_clipping", "max_norm"), "max_grad_norm"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "seq_len", "sequence_len", "model_max_length"),
        "data.max_length",
    ),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path", "data_path", "train_file"), "data.dataset"),
    **dict.fromkeys(("sample_packing", "neat_packing", "pack"), "data.packing"),
    **dict.fromkeys(("template", "chat_template_path"), "data.chat_template"),
    **dict.fromkeys(("val_set_size", "test_size", "eval_size"), "data.held_out"),
    **dict.fromkeys(("bf16", "torch_dtype", "precision"), "dtype bfloat16"),
    **dict.fromkeys(("fp16", "half"), "dtype bfloat16 (float16 training is not offered)"),
    **dict.fromkeys(("fp32",), "dtype float32"),
    **dict.fromkeys(("use_gradient_checkpointing", "activation_checkpointing"), "gradient_checkpointing"),
    **dict.fromkeys(("use_flash_attention_2", "flash_attention", "flash_attn"), "attn_implementation"),
    **dict.fromkeys(("deepspeed_config", "ds_config"), "deepspeed"),
    **dict.fromkeys(("config", "recipe"), "config_path"),
}

NOT_HERE: dict[str, str] = {}  # other libraries' names of what is not offered -> what to do instead

REFUSALS = {  # a name that is no setting here -> how the message that refuses it ends
    **{theirs: f"did you mean {ours}?" for theirs, ours in SYNONYMS.items()},
    **{theirs: f"it is not offered here: {sentence}" for theirs, sentence in NOT_HERE.items()},
}
