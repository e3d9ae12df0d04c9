"""Prepare the data of the experiments: each task turns a source into the files that the stages read.

sft.jsonl       texts to imitate               {"prompt", "completion"}
prompts.jsonl   prompts to sample for          {"prompt"}
test.jsonl      held-out prompts               {"prompt"}, and "chosen" if a person wrote or chose an answer
pairs.jsonl     preferences                    {"prompt", "chosen", "rejected"}; missing if an oracle labels samples
labelled.jsonl  training data of a classifier  {"text", "label"}; only for reviews
base/           a model to start from; missing if the recipe names one

No prompt of test.jsonl is in another file.
"""

from exo.experiments.tasks.registry import BY_TOKENS, MODEL_MAKERS, TASKS, load

__all__ = ["BY_TOKENS", "MODEL_MAKERS", "TASKS", "load"]
