"""The groups of options in `--help-all`, the few options that `--help` shows, and the layout of both."""

import argparse
import textwrap


class Formatter(argparse.HelpFormatter):
    """Wrap the paragraphs of a description one by one, and keep indented ones, such as commands, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def fill(paragraph: str) -> str:
            return textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)

        return "\n\n".join(p if p.startswith(" ") else fill(p) for p in text.strip().split("\n\n"))


# An option that is in no group is one of the command's own.
GROUPS = {
    "Model": "model ref_model reference reference_cache reward_model oracle tokenizer",
    "Data": "data eval_data eval_fraction samples baseline columns ignore_columns system_column data_weights "
    "skip_invalid chat_template template_kwargs max_length max_prompt_length max_completion_length truncate "
    "max_completions first prompts source rows",
    "Objective": "loss target beta_pi beta_r label_smoothing reward_norm temperature labels kl_coef gamma lam "
    "clip_range clip_range_value value_coef ppo_epochs rollout_size",
    "Sampling": "k top_p max_new_tokens engine epochs",
    "Optimization": "batch_size learning_rate critic_learning_rate critic_warmup_steps lr_scheduler_type warmup_steps "
    "warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm dropout num_train_epochs max_steps "
    "on_nan",
    "Memory and speed": "dtype device nproc fsdp max_tokens_per_batch gradient_checkpointing compile share_prompt "
    "load_in_4bit",
    "LoRA": "lora_r lora_alpha lora_dropout lora_targets lora_output",
    "Checkpoints": "save_steps save_total_limit resume_from_checkpoint allow_changes export_steps save_dtype",
    "Logging": "eval_steps logging_steps report_to profile",
    "Run": "output_dir overwrite_output_dir seed config help help-all",
}
OTHER = "Command"
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}

# What people set first; `--help` of a command with more options than ALL shows only these.
FIRST = (
    "model data eval_data eval_fraction loss target beta_pi beta_r reward_model oracle labels kl_coef k temperature "
    "max_new_tokens reference samples batch_size learning_rate num_train_epochs max_steps max_length lora_r nproc "
    "output_dir config help help-all"
).split()
ALL = 16
