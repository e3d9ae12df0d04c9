"""Sample with vLLM instead of PyTorch. Its random streams are not those of `generate`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from exo import models
from exo.cli import console
from exo.data import Example
from exo.data.text import tokenize
from exo.rollouts import samples
from exo.rollouts.generate import Job, Sample, stream_seed

CHUNK_SIZE = 8192  # completions per call of vLLM; a kill loses at most one call


class Engine:
    """A causal LM loaded by vLLM, which uses all GPUs by itself.

    ValueError if vLLM is not installed, or if there are several ranks.
    """

    def __init__(self, name: str, tokenizer: Any, *, dtype: str, seed: int, num_processes: int) -> None:
        if num_processes > 1:
            raise ValueError("--engine vllm: expected one process, which manages all GPUs; leave out --nproc")
        try:
            import vllm
        except ModuleNotFoundError:
            raise ValueError("--engine vllm: not installed; pip install vllm, or leave out --engine") from None
        self.tokenizer, self.new_params = tokenizer, vllm.SamplingParams
        self.stop_ids = list(models.stop_ids(name, tokenizer))
        self.logit_bias = dict.fromkeys(models.absent_ids(name, tokenizer), -100.0) or None
        self.llm = vllm.LLM(model=name, dtype=dtype, seed=seed, logprobs_mode="processed_logprobs")

    def draw(
        self,
        prompts: Sequence[str],
        settings: samples.Settings,
        *,
        numbers: Sequence[int],
        k: int,
        max_prompt_length: int,
        seed: int,
        run: Callable[[Sequence[Job]], list[list[Sample]]],
    ) -> list[Example]:
        """Draw `k` completions of each prompt, as `samples.draw` does.

        Log-probs are those of the distribution that vLLM draws from: if top_p is below 1, they are not the model's.
        """
        ids, counts = tokenize.sampled_prompts(prompts, self.tokenizer, max_prompt_length)
        console.counts(counts)

        options: dict[str, Any] = {"n": 1, "temperature": settings.temperature, "top_p": settings.top_p, "logprobs": 0}
        options |= {"max_tokens": settings.max_new_tokens, "stop_token_ids": self.stop_ids}
        options |= {"logit_bias": self.logit_bias}

        def draw_chunk(chunk: slice) -> list[Sample]:
            seeds = [stream_seed(seed, number, j) for number in numbers[chunk] for j in range(k)]
            params = [self.new_params(**options, seed=value) for value in seeds]
            token_ids = [{"prompt_token_ids": row} for row in ids[chunk] for _ in range(k)]
            return [self._sample(output.outputs[0]) for output in self.llm.generate(token_ids, params)]

        size = max(1, CHUNK_SIZE // k)
        chunks = [slice(start, start + size) for start in range(0, len(ids), size)]
        flat = [sample for drawn in run([partial(draw_chunk, chunk) for chunk in chunks]) for sample in drawn]
        rows = [flat[start : start + k] for start in range(0, len(flat), k)]
        return samples.to_examples(prompts, ids, rows, self.tokenizer, settings, numbers)

    def _sample(self, completion: Any) -> Sample:
        ids = tuple(completion.token_ids)
        logprob = sum(at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True))
        return Sample(ids, logprob, "eos" if ids[-1] in self.stop_ids else "length")
