"""Other libraries' names of settings: what they are called here, or why there is no such setting.

The message that refuses an unknown setting uses both tables. docs/migrate.md shows the same names by library, and
tests/test_synonyms.py compares the page with the tables. A name that is the last part of a setting here (`packing` of
data.packing) needs no entry.
"""

__all__ = ["NOT_HERE", "REFUSALS", "SYNONYMS"]


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    """{meaning: "name name ..."} -> {name: meaning}; a name that stands in two groups is an error."""
    pairs = [(name, meaning) for meaning, names in groups.items() for name in names.split()]
    table = dict(pairs)
    assert len(table) == len(pairs), "a name has two meanings"
    return table


SYNONYMS = _by_name(  # a setting here, perhaps with a value or a remark -> other libraries' names of it
    {
        # model, precision and quantization
        "model_name_or_path": "model base_model model_name model_path model_id base_model_name_or_path "
        "pretrained_model_name_or_path",
        "model_revision": "revision revision_of_model base_model_revision",
        "dtype": "bnb_4bit_compute_dtype",
        "dtype bfloat16": "bf16 bfloat16 pure_bf16 torch_dtype precision",
        "dtype bfloat16 (float16 training is not offered)": "fp16 float16 half",
        "dtype float32": "fp32 float32",
        "codec nf4": "load_in_4bit bnb_4bit_quant_type quantization_type",
        "codec int8": "load_in_8bit",
        "codec nf4 (4 bits) or codec int8 (8 bits)": "quantization_bit quantization_method quantization_config",
        "codec_double_quant": "bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization",
        "use_liger_kernel": "enable_liger_kernel",
        "attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2 flash_attention_2 "
        "use_flash_attn attn_backend attention attn",
        "attn_implementation sdpa": "sdpa sdp_attention",
        "attn_implementation eager": "eager_attention",
        "new_tokens": "add_tokens add_special_tokens new_special_tokens special_tokens resize_vocab",
        "modules_to_save": "lora_modules_to_save additional_target unfrozen_parameters",
        "trained_tokens (their texts, not numbers)": "trainable_token_indices peft_trainable_token_indices",
        # output
        "output_dir": "out output out_dir save_dir",
        "overwrite_output_dir": "overwrite overwrite_output",
        "save_merged": "merge_lora merge merge_and_unload",
        # method
        "method.type": "adapter peft peft_type finetuning_type tuner tuner_type train_type method_type use_peft",
        "method.rank": "r lora_r lora_rank lora_dim",
        "method.alpha": "lora_alpha",
        "method.dropout": "lora_dropout",
        "method.target_modules": "lora_target_modules lora_target lora_modules",
        "method.target_modules all-linear": "lora_target_linear lora_target_modules_all target_linear all_linear",
        "method.use_rslora": "peft_use_rslora",
        "method.adapter": "adapter_name_or_path lora_model_dir lora_path peft_model_id resume_from_adapter "
        "adapter_name adapter_path adapters lora_adapter lora_weights lora_checkpoint resume_lora pretrained_adapter "
        "init_adapter checkpoint_dir",
        "method.adapter_role frozen": "create_new_adapter",
        "method.b_rate": "loraplus_lr_ratio loraplus_ratio",
        "method.type lora": "use_lora lora",
        "method.type lora with codec nf4": "qlora use_qlora",
        "method.type dora": "use_dora peft_use_dora",
        "method.type pissa (other starts of A and B are not offered)": "init_lora_weights peft_init_lora_weights "
        "init_weights",
        "method.type pissa": "pissa_init use_pissa",
        "method.svd_niter": "pissa_iter",
        "method.type lora_ga": "lora_ga_config use_lora_ga",
        "method.type relora": "relora use_relora",
        "method.interval": "jagged_restart_steps relora_steps cycle_length",
        "method.restart_warmup": "jagged_restart_warmup_steps relora_warmup_steps restart_warmup_steps",
        "method.moments": "relora_prune_method reset_optimizer_on_relora",
        "method.prune_ratio": "relora_prune_ratio optimizer_magnitude_pruning",
        "method.type rasa": "use_rasa",
        "method.k": "rasa_k",
        "method.p": "droplora_inner_dropout inner_dropout",
        "method.factor": "rank_factor",
        "method.output_factor": "output_dim_factor",
        "method.pro": "use_pro",
        # batches and length of the run
        "per_device_train_batch_size": "micro_batch_size train_batch_size per_device_batch_size "
        "per_gpu_train_batch_size bs train_bs",
        "per_device_train_batch_size (of one rank; gradient_accumulation_steps and the number of ranks multiply it)": ""
        "batch_size global_batch_size",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "accumulation grad_accum gradient_accumulation accum_steps "
        "accumulate_grad_batches gradient_accumulation_batches ga_steps",
        "num_train_epochs": "epochs num_epochs epoch n_epochs max_epochs",
        "max_steps": "steps num_steps max_train_steps num_training_steps total_steps training_steps iters",
        "gradient_checkpointing": "gc use_gradient_checkpointing activation_checkpointing "
        "disable_gradient_checkpointing",
        "seed": "data_seed random_seed",
        # optimizer and schedule
        "optim": "optimizer",
        "optim lion": "use_lion",
        "learning_rate": "lr",
        "max_grad_norm": "clip grad_clip grad_clipping gradient_clipping max_norm clip_grad_norm",
        "lr_scheduler_type": "lr_scheduler scheduler schedule lr_schedule learning_rate_scheduler",
        "adam_beta1 and adam_beta2": "betas adam_betas",
        "adam_epsilon": "eps epsilon adam_eps",
        "loss_type dft": "use_dft_loss",
        "label_smoothing": "label_smoothing_factor",
        "neftune_noise_alpha": "noisy_embedding_alpha",
        "warmup_steps": "warmup num_warmup_steps",
        "warmup_ratio": "warmup_steps_ratio",
        "min_lr_rate": "lr_scheduler_kwargs cosine_min_lr_ratio min_lr_ratio min_lr",
        # data
        "data.dataset": "dataset datasets dataset_name dataset_path dataset_dir data_path data_name data_dir "
        "train_file pretraining_dataset train_data data_files",
        "data.split": "train_split dataset_train_split",
        "data.split train[:1000] (the first 1000 rows)": "max_samples max_train_samples",
        "data.subset": "subset dataset_config dataset_config_name dataset_subset",
        "data.revision": "dataset_revision",
        "data.columns": "dataset_text_field text_column field_messages text_field prompt_column response_column "
        "input_column output_column",
        "data.weights": "interleave_probs dataset_weights mix_strategy",
        "data.max_length": "max_seq_length max_seq_len cutoff_len seq_len sequence_len model_max_length max_len "
        "block_size context_length ctx_len",
        "data.max_length (of a prompt with its answer)": "max_prompt_length max_completion_length max_source_length "
        "max_target_length source_max_len target_max_len",
        "data.format": "dataset_format dataset_type",
        "data.prompt_style": "prompt_template",
        "data.packing": "sample_packing neat_packing pack padding_free batch_flattening",
        "data.group_by_length": "train_sampling_strategy",
        "data.chat_template": "template chat_template_path chat_template_jinja chat_template_name",
        "data.system": "default_system default_system_message system_prompt",
        "data.train_on last": "mask_history",
        "data.workers": "dataset_num_proc dataset_processes preprocessing_num_workers",
        "data.held_out (a number of examples, not a share)": "val_set_size val_size test_size eval_size "
        "split_dataset_ratio",
        # logging, evaluation, checkpoints
        "eval_steps": "eval_strategy evaluation_strategy evals_per_epoch eval_every eval_interval eval_freq",
        "save_steps": "save_strategy saves_per_epoch save_every save_interval save_freq checkpoint_every "
        "checkpoint_interval ckpt_interval",
        "logging_steps": "logging_strategy logging_first_step log_every log_interval log_freq log_steps",
        "report_to wandb": "use_wandb",
        "report_to mlflow": "use_mlflow",
        "report_to swanlab": "use_swanlab",
        "report_to": "log_with",
        "load_best_model_at_end": "load_best save_best_model keep_best",
        "early_stopping_patience": "early_stopping_steps early_stopping",
        "resume_from_checkpoint auto": "resume auto_resume_from_checkpoints",
        # engines
        "deepspeed": "deepspeed_config ds_config",
        "deepspeed ds_configs/zero3.json": "zero_stage zero3 stage3",
        "engine fsdp": "fsdp fsdp_config fsdp_version fsdp_sharding_strategy fsdp2 sharding_strategy",
        "fsdp.reshard_after_forward": "fsdp_reshard_after_forward",
        "fsdp.cpu_offload": "fsdp_offload_params offload_params",
        "config_path": "config recipe",
        "deterministic": "full_determinism",
    }
)

NOT_HERE = _by_name(  # what to do instead -> other libraries' names of what is not offered
    {
        # model
        "the tokenizer comes from model_name_or_path; data.chat_template replaces its chat template": "tokenizer "
        "tokenizer_name tokenizer_name_or_path tokenizer_config use_fast_tokenizer",
        "code that comes with a checkpoint is never run; the architecture must be one of transformers": ""
        "trust_remote_code",
        "the launcher gives each rank a device, and engine spreads the model over the ranks": "device_map max_memory "
        "device devices gpus num_gpus n_gpu use_cpu accelerator world_size",
        "every rank reads only the rows that it keeps, in any case": "low_cpu_mem_usage qlora_sharded_model_loading",
        "it is read from the checkpoint's config.json; change it in a copy of the checkpoint": "rope_scaling "
        "tie_word_embeddings max_position_embeddings model_type tokenizer_type use_cache",
        "codes and scales are stored as bytes, and every engine shards them": "bnb_4bit_quant_storage",
        "the frozen weights can be stored dense, in nf4 or in int8; see codec": "fp8 load_in_fp8 gptq",
        "PyTorch's default applies; take dtype bfloat16 for speed": "tf32",
        "the fused experts of a mixture are not adapted; allow_partial: true trains its other modules": ""
        "target_parameters lora_target_parameters moe_aux_loss_coef",
        # what is trained
        "adapters of linear modules are trained, rows of trained_tokens, and the modules of modules_to_save": ""
        "bias train_others lora_bias train_bias train_embeddings train_lm_head train_norm freeze freeze_layers "
        "freeze_trainable_layers freeze_trainable_modules unfreeze "
        "num_layers_unfrozen",
        "name the modules to adapt in method.target_modules, as full names where only some layers are meant": ""
        "layers_to_transform layers_pattern peft_layers_to_transform layer_replication",
        "rows of new_tokens and trained_tokens and modules_to_save have the rate of the adapters": ""
        "loraplus_lr_embedding",
        "the starts are those of method.type lora, pissa, lora_ga and lora_one": "loftq_config eva_config "
        "corda_config lora_init",
        "the exported adapter is always a LoRA over the untouched base model": "pissa_convert merge_method",
        "GaLore, APOLLO and BAdam are not methods here; method.type losia also trains without a low-rank product": ""
        "use_galore use_apollo use_badam optim_target_modules",
        "--help lists the methods under method.type": "use_qalora use_bdlora kasa_config arrow_config velora_config "
        "monteclora_config use_mora use_vera",
        "the ledger of what W received lies in host memory, in any case": "relora_cpu_offload",
        "linear layers are nn.Linear; GPT-2's Conv1D is not supported": "fan_in_fan_out lora_fan_in_fan_out",
        "only causal language models are trained": "task_type lora_task_type",
        # optimizer, schedule, loss
        "the optimizers are adamw and lion; betas, epsilon and decay are settings of their own": "optim_args "
        "adam_beta3",
        "there is one learning rate; a method may scale it after an exchange": "embedding_lr lr_groups",
        "logits are never built as a whole, with any model; use_liger_kernel takes Liger's other kernels": ""
        "liger_kernel_config cut_cross_entropy",
        "checkpointing is always the non-reentrant kind": "gradient_checkpointing_kwargs use_reentrant_gc",
        "activations stay on the device; gradient_checkpointing keeps fewer of them": "activation_offloading",
        "the backend of torch_compile is torch's inductor": "torch_compile_backend torch_compile_mode",
        "Unsloth's kernels are not used": "use_unsloth use_unsloth_gc",
        "only the model's states are sharded (ZeRO, FSDP2), not sequences, tensors or layers": "context_parallel_size "
        "sequence_parallel_size sequence_parallel_degree tensor_parallel_size pipeline_parallel_size "
        "parallelism_config",
        "print the memory with --dry_run and choose per_device_train_batch_size": "auto_find_batch_size",
        "a thread makes the batches one step ahead, and nothing is dropped": "dataloader_num_workers "
        "dataloader_drop_last dataloader_pin_memory dataloader_prefetch_factor",
        # data
        "tokens are kept in LLM_LOWRANK_CACHE, by the content of the data": "cache_dir dataset_prepared_path "
        "tokenized_path overwrite_cache",
        "data.held_out keeps examples out of training; launch/evaluate.py takes other data": "eval_dataset "
        "test_datasets val_dataset validation_file dataset_test_split eval_data valid_data dev_file test_file",
        "answers are trained and prompts are not; in data.format text all is trained": "train_on_inputs "
        "train_on_prompt completion_only_loss assistant_only_loss train_on_responses_only response_template "
        "instruction_template loss_on_prompt train_on_source",
        "data.train_on trains all answers of a conversation, or the last; weight: 0 leaves one out": "roles_to_train "
        "train_on_eos train_on_eot",
        "a row's column tools goes to the chat template, which decides how calls are written": "tool_format tools",
        "rows of unpacked batches are as long as the longest one; data.packing fills rows": "pad_to_sequence_len "
        "pad_to_multiple_of",
        "packing takes the longest example first, into the fullest row with room": "packing_strategy eval_packing "
        "eval_sample_packing",
        "padding is masked, and the end of an answer is trained, whatever the tokenizer's special tokens are": ""
        "pad_token eos_token",
        "the seed shuffles the examples anew in every epoch": "shuffle_dataset shuffle_merged_datasets shuffle",
        "a stream is shuffled in a buffer of 10,000 rows": "buffer_size",
        "examples longer than data.max_length are cut at the end": "truncation_mode",
        "a row's column chat_template_kwargs sets variables of its chat template": "enable_thinking thinking "
        "chat_template_kwargs",
        "columns that are not read are named, and data.ignore lists those that may be left aside": ""
        "remove_unused_columns dataset_kwargs skip_prepare_dataset",
        "a run trains on text": "media_dir image_dir image_folder vision_tower image_max_pixels",
        # run
        "the launcher's options stand before the script: torchrun --nproc_per_node 2 launch/train.py": "nproc_per_node "
        "nnodes node_rank master_addr master_port",
        "a run's own questions are answered greedily; launch/evaluate.py has --max_new_tokens and --temperature": ""
        "max_new_tokens temperature "
        "top_p top_k do_sample generation_config",
        "the held-out loss is summed as it is computed; per_device_eval_batch_size decides its memory": ""
        "eval_accumulation_steps",
        "the loss is the mean over all trained tokens of a step, on any number of ranks": ""
        "average_tokens_across_devices",
        "the models of the hub that need it are read after hf auth login, or with HF_TOKEN": "token hf_token "
        "use_auth_token",
        "launch/train.py trains, launch/evaluate.py evaluates": "do_train do_eval do_predict predict_with_generate",
        "there is one kind of training, supervised fine-tuning": "stage rl pref_beta dpo_beta beta kl_coef dpo "
        "kto orpo grpo ppo rlhf ref_model reward_model",
        "a lower loss is better, and more exact matches are; any improvement counts": "greater_is_better "
        "early_stopping_threshold",
        "a run has the name of its output_dir, in the project llm_lowrank": "run_name project wandb_project wandb_name",
        "metrics.jsonl and TensorBoard's files are written to output_dir": "logging_dir plot_loss",
        "push_to_hub uploads once, at the end of the run, to the main branch, with the token of HF_TOKEN": ""
        "hub_strategy hub_token hub_revision hub_always_push",
        "every file of weights is safetensors": "save_safetensors",
        "a checkpoint always holds what a resume needs; adapter/ holds the adapter alone": "save_only_model",
        "a run saves at SIGTERM or SIGUSR1, in any case": "enable_jit_checkpoint",
        "a resumed run takes up the data where it stopped": "ignore_data_skip",
        "launch/merge.py --checkpoint OUTPUT_DIR --output FOLDER writes the merged model": "export_dir "
        "export_quantization_bit lora_on_cpu",
        # engines
        "each decoder layer is sharded as one unit, in any case": "fsdp_transformer_layer_cls_to_wrap "
        "fsdp_auto_wrap_policy auto_wrap_policy transformer_layer_cls_to_wrap",
        "the checkpoints are the library's own and do not depend on the number of ranks": "fsdp_state_dict_type "
        "state_dict_type",
        "start the ranks with deepspeed, torchrun or python; engine says how they share the model": ""
        "accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_backend single_gpu",
    }
)

REFUSALS = {  # a name that is no setting here -> how the message that refuses it ends
    **{theirs: f"did you mean {ours}?" for theirs, ours in SYNONYMS.items()},
    **{theirs: f"not offered here: {sentence}" for theirs, sentence in NOT_HERE.items()},
}
