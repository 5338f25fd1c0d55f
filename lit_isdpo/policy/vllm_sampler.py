"""Sampling by vLLM, many times as fast for large models: the policy as a temporary folder, token ids in and out."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from lit_isdpo.policy.generation import Sampling, Vocabulary, seed_of
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError, Response


def check_vllm(option: str) -> None:
    """Raises where vLLM is not installed.

    Raises:
        InputError: says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f'{option}: vLLM is not installed; pip install "lit_isdpo[vllm]", or use transformers.')


class VLLMSampler:
    """Draws responses with vLLM, which is started at the first call and stopped by :meth:`close`.

    Its kernels are not those that score: the KL's estimators are then off by the rounding between the two.

    Args:
        policy: the model. Its weights are written when vLLM is started, an adapter merged into them.
        with_adapter: false samples the base of a policy with an adapter.
        options: of ``vllm.LLM``, ``{tensor_parallel_size: 2, gpu_memory_utilization: 0.5}`` say.
    """

    def __init__(self, policy: LogProbModel, *, with_adapter: bool = True, options: Mapping[str, Any]) -> None:
        self._policy = policy
        self._with_adapter = with_adapter
        self._options = options
        self._engine: Any = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, vocabulary: Vocabulary, *place: object
    ) -> list[list[Response]]:
        """As :func:`~lit_isdpo.policy.generation.sample`, for the policy; vLLM makes its own batches."""
        from vllm import SamplingParams

        if self._engine is None:
            self._engine = self._start()
        size = self._policy.vocabulary_size
        padding = range(self._policy.num_tokens or size, size)
        parameters = [
            SamplingParams(
                n=sampling.num_responses,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=vocabulary.eos_token_ids,
                seed=seed_of(sampling.seed, *place, number),
                detokenize=False,
                logit_bias=dict.fromkeys(padding, -100.0) or None,  # vLLM's least
            )
            for number in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._engine.generate(inputs, parameters, use_tqdm=False)
        return [[_response(drawn, vocabulary.eos_token_ids) for drawn in output.outputs] for output in outputs]

    def close(self) -> None:
        """Gives its memory back."""
        self._engine = None

    def _start(self) -> Any:
        from vllm import LLM

        with tempfile.TemporaryDirectory(prefix="lit_isdpo_vllm_") as folder:  # it is read once, at the start
            write_plain_model(self._policy, Path(folder), with_adapter=self._with_adapter)
            return LLM(
                model=folder,
                dtype=str(self._policy.compute_dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own would fill in what is not said, a chat model's top_k say
                **self._options,
            )


def write_plain_model(policy: LogProbModel, folder: Path, *, with_adapter: bool) -> None:
    """Writes a Hugging Face folder without tokenizer, the adapter merged or left out."""
    if policy.adapter is None:
        policy.model.save_pretrained(folder)
        return
    adapter = deepcopy(policy.adapter)  # merging changes the model in place
    (adapter.merge() if with_adapter else adapter.unload()).save_pretrained(folder)


def _response(drawn: Any, eos_token_ids: Sequence[int]) -> Response:
    """A response with its EOS where it has ended; vLLM may leave that out."""
    ids = list(drawn.token_ids)
    if drawn.finish_reason != "stop":
        return Response(ids, False)
    if not ids or ids[-1] not in eos_token_ids:
        ids.append(drawn.stop_reason if isinstance(drawn.stop_reason, int) else eos_token_ids[0])
    return Response(ids, True)
