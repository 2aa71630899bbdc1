"""Names of options in other trainers (verl, TRL, SkyRL, OpenRLHF and others), by their last part -> ours.

Of several options, likeliest first, the one in the most similar section is suggested: `critic.optim.lr` is the
critic's.
"""

from __future__ import annotations

_OPTIM = ("learner.optim", "learner.algorithm.critic.optim", "stages.optim")


def _of_optim(option: str) -> tuple[str, ...]:
    return tuple(f"{section}.{option}" for section in _OPTIM)


# Our names -> theirs, separated by spaces.
_THEIRS: dict[tuple[str, ...], str] = {
    ("name",): "run_name experiment_name exp_name project_name",
    ("seed",): "seed random_seed manual_seed data_seed",
    ("steps",): "max_steps total_steps num_steps total_training_steps num_train_steps train_steps num_episodes "
    "total_epochs num_train_epochs total_episodes iterations num_iters",
    ("env.id",): "env_id env_name environment env_class task_name",
    ("env.options",): "env_kwargs env_config env_args",
    ("env.shuffle",): "shuffle_dataset shuffle shuffle_prompts dataset_shuffle",
    ("buffer.curriculum.repeat_share",): "curriculum use_curriculum curriculum_class",
    ("stages.source.path",): "dataset_name train_files train_file prompt_data input_data",
    ("agent.parts",): "tools",
    ("sampling.temperature",): "temp sampling_temperature",
    ("sampling.top_p",): "nucleus",
    ("sampling.max_tokens",): "max_new_tokens max_response_length max_completion_length max_generate_length "
    "generate_max_len max_gen_len max_response_len rollout_max_response_len response_length max_output_tokens",
    ("rollout.workers",): "num_workers n_workers num_engines vllm_num_engines num_inference_engines num_actors "
    "num_rollout_workers num_env_runners",
    ("rollout.group_size",): "n num_generations n_samples_per_prompt samples_per_prompt n_samples num_samples "
    "num_rollouts rollouts_per_example rollouts_per_prompt num_generations_per_prompt group_n generations k",
    ("rollout.context_tokens",): "max_prompt_length max_model_len max_seq_len max_seq_length max_length seq_len "
    "prompt_max_len max_prompt_len max_sequence_length context_length max_context_length max_total_sequence_length",
    ("rollout.max_turns",): "max_assistant_turns max_user_turns max_episode_steps num_turns max_rollout_turns "
    "max_tool_calling_iterations",
    ("rollout.dynamic_sampling",): "filter_groups filter_zero_adv use_dynamic_sampling "
    "dynamic_sampling_filter filter_overlong_prompts",
    ("rollout.concurrent_groups",): "max_concurrent_rollouts max_concurrency concurrency",
    ("engine.tensor_parallel_size",): "tp tp_size tensor_model_parallel_size vllm_tensor_parallel_size "
    "rollout_tp num_gpus_per_engine rollout_num_gpus_per_engine inference_engine_tensor_parallel_size",
    ("engine.pipeline_parallel_size",): "pp pp_size pipeline_model_parallel_size "
    "inference_engine_pipeline_parallel_size",
    ("engine.data_parallel_size",): "dp_size inference_engine_data_parallel_size",
    ("engine.expert_parallel",): "inference_engine_expert_parallel_size",
    ("engine.expert_parallel", "learner.model.expert_parallel"): "enable_expert_parallel ep ep_size "
    "expert_parallel_size",
    ("engine.args",): "engine_kwargs vllm_kwargs engine_args vllm_engine_kwargs engine_init_kwargs vllm_config",
    ("engine.memory_fraction",): "gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static",
    ("engine.enforce_eager",): "eager vllm_enforce_eager",
    ("engine.max_num_seqs",): "max_running_requests vllm_max_num_seqs",
    ("buffer.groups_per_step",): "batch_size train_batch_size rollout_batch_size global_batch_size "
    "num_prompts_per_step prompts_per_step groups_per_batch num_groups gen_batch_size num_prompts "
    "batch_size_per_step total_batch_size generation_batch_size",
    ("buffer.max_lag",): "max_staleness staleness staleness_threshold max_off_policy_steps max_async_level "
    "async_level off_policy_steps max_head_offpolicyness max_lag max_staleness_steps max_trajectory_age_steps",
    ("learner.model.path",): "model model_name model_name_or_path model_path pretrain pretrained base_model "
    "hf_checkpoint actor_model",
    ("learner.model.dtype", "engine.dtype"): "dtype bf16 fp16 torch_dtype precision model_dtype",
    ("learner.model.float8",): "fp8 use_fp8 fp8_training fp8_recipe enable_fp8",
    ("learner.model.compile",): "torch_compile use_torch_compile enable_compile compile_model enable_torch_compile",
    ("learner.model.device",): "device",
    ("learner.model.router_replay",): "enable_rollout_routing_replay use_rollout_routing_replay use_routing_replay "
    "enable_return_routed_experts moe_router_replay",
    ("learner.model.expert_parallel",): "expert_model_parallel_size expert_parallel_degree",
    ("learner.model.router_balance",): "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef",
    ("learner.model.gradient_checkpointing",): "use_gradient_checkpointing enable_gradient_checkpointing "
    "activation_checkpointing recompute_granularity gradient_checkpointing_enable",
    ("learner.model.lora.rank",): "lora_rank lora_r r",
    ("learner.model.lora.alpha",): "lora_alpha",
    ("learner.model.lora.targets",): "target_modules lora_target_modules",
    ("learner.model.lora.quantize_base",): "load_in_4bit bnb_4bit_quant_type quantization_bit qlora use_qlora",
    _of_optim("learning_rate"): "lr actor_lr actor_learning_rate policy_lr max_lr",
    ("learner.algorithm.critic.optim.learning_rate",): "critic_lr critic_learning_rate value_lr",
    _of_optim("weight_decay"): "wd",
    _of_optim("moments"): "adam_8bit adam8bit adamw_8bit adamw_bnb_8bit optim_bits use_8bit_adam use_8bit_optimizer",
    _of_optim("offload"): "optimizer_offload offload_optimizer adam_offload cpu_offload",
    ("cluster.colocate",): "colocate_all colocate_all_models colocated vllm_mode hybrid_engine free_cache_engine "
    "vllm_enable_sleep enable_sleep_mode vllm_enable_sleep_mode",
    _of_optim("betas"): "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    _of_optim("eps"): "adam_epsilon adam_eps",
    _of_optim("max_grad_norm"): "grad_clip max_norm clip_grad gradient_clipping grad_norm clip_grad_norm "
    "gradient_clip_val",
    _of_optim("warmup_steps"): "warmup lr_warmup_steps num_warmup_steps warmup_ratio lr_warmup_ratio "
    "lr_warmup_steps_ratio",
    _of_optim("schedule"): "lr_scheduler lr_scheduler_type scheduler scheduler_type lr_schedule lr_decay_style "
    "warmup_style",
    ("learner.algorithm.advantage.kind",): "adv_estimator advantage_estimator advantage algo algorithm_name",
    ("learner.algorithm.advantage.gamma",): "gamma discount discount_factor",
    ("learner.algorithm.advantage.lam",): "lam lambd lambda lambda_ gae_lambda",
    ("learner.algorithm.loss.kind",): "loss_type loss_mode policy_loss_type policy_loss loss_fn",
    ("learner.algorithm.loss.clip_low",): "clip_ratio clip_ratio_low epsilon epsilon_low eps_clip eps_clip_low "
    "cliprange clip_range clip_eps clip_param clip_epsilon",
    ("learner.algorithm.loss.clip_high",): "clip_ratio_high epsilon_high eps_clip_high",
    ("learner.algorithm.loss.dual_clip",): "clip_ratio_c eps_clip_c",
    ("learner.algorithm.aggregation",): "loss_agg_mode loss_reduction loss_aggregation",
    ("learner.algorithm.kl.coefficient",): "beta kl_coef kl_coeff kl_loss_coef init_kl_coef kl_beta kl_coefficient "
    "kl_weight kl_loss_weight kl_penalty_coef",
    ("learner.algorithm.distill.teacher",): "teacher teacher_model teacher_model_name_or_path teacher_path "
    "opd_teacher_load distillation_teacher",
    ("learner.algorithm.distill.coefficient",): "opd_kl_coef distill_coef distillation_coef",
    ("learner.algorithm.kl.estimator",): "kl_penalty kl_loss_type kl_estimator kl_penalty_type",
    ("learner.algorithm.entropy_bonus",): "entropy_coef entropy_coeff ent_coef entropy_loss_coef entropy_weight",
    ("learner.algorithm.critic.value_clip",): "cliprange_value value_clip_range vf_clip_param eps_clip_value",
    ("learner.algorithm.critic.value_coefficient",): "vf_coef value_loss_coef vf_loss_coeff",
    ("learner.algorithm.corrections",): "tis_imp_ratio_cap importance_sampling_cap rollout_is rollout_is_threshold "
    "use_tis vllm_importance_sampling_correction",
    ("learner.algorithm.minibatches",): "mini_batch_size ppo_mini_batch_size policy_mini_batch_size num_mini_batches "
    "num_minibatches minibatch_size steps_per_generation",
    ("learner.algorithm.epochs",): "ppo_epochs num_iterations num_ppo_epochs update_epochs max_epochs n_epochs "
    "update_epochs_per_batch",
    ("learner.tokens_per_microbatch",): "micro_batch_size micro_train_batch_size per_device_train_batch_size "
    "ppo_micro_batch_size ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu max_tokens_per_gpu "
    "micro_train_batch_size_per_gpu gradient_accumulation_steps train_micro_batch_size",
    ("learner.ranks",): "num_gpus n_gpus n_gpus_per_node num_gpus_per_node world_size nproc_per_node dp_size "
    "actor_num_gpus_per_node policy_num_gpus_per_node num_learners",
    ("learner.context_parallel_size",): "context_parallel_degree cp_size ulysses_sequence_parallel_size "
    "sequence_parallel_size sp_size ulysses_size ring_attn_size context_parallel",
    ("evaluation.tasks",): "eval_batch_size val_batch_size num_eval_episodes num_eval eval_num_examples",
    ("evaluation.samples",): "val_n num_samples_per_task repeats eval_repeats eval_n_samples val_kwargs_n",
    ("evaluation.every_steps",): "test_freq eval_steps eval_freq eval_interval eval_every val_interval val_period",
    ("checkpoint.best_metric",): "metric_for_best_model best_model_metric load_best_model_at_end",
    ("checkpoint.every_steps",): "save_freq save_steps save_interval ckpt_interval save_every ckpt_freq "
    "save_period checkpoint_interval",
    ("checkpoint.keep",): "save_total_limit max_ckpt_num keep_last max_ckpts_to_keep max_actor_ckpt_to_keep "
    "keep_top_k",
    ("cluster.address",): "ray_address",
}  # fmt: skip

SYNONYMS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}
