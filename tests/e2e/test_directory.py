"""A Hugging Face directory in shards, through the whole mesh, against transformers."""

import random
from pathlib import Path
from typing import Any

import openai
import pytest

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.e2e.mesh_process import mesh_process
from tests.e2e.reference import Reference

NUM_ANSWER_TOKENS = 32
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
"""What the directory's chat template makes of a user's Hi."""


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
async def test_a_sharded_directory_gives_the_tokens_of_transformers(
    tmp_path: Path, family: str
) -> None:
    window: Any = {"sliding_window": 48} if family == "mistral" else {}
    model = tiny_checkpoint(tmp_path, family, max_shard_size="40KB", **window)
    assert len(list(model.glob("*.safetensors"))) > 2
    reference, generator = Reference(model), random.Random(0)
    with mesh_process(tmp_path, "--model", str(model), "--dtype", "float32") as mesh:
        async with open_channel(mesh.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            for length in (1, 16, 17, 100, 300):
                prompt = [generator.randrange(3, VOCAB_SIZE) for _ in range(length)]
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=prompt),
                    sampling=SamplingParams(
                        temperature=0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True
                    ),
                )
                answer = [
                    token
                    async for response in stub.Generate(request)
                    for delta in response.deltas
                    for token in delta.token_ids
                ]
                assert len(answer) == NUM_ANSWER_TOKENS
                assert reference.first_difference(prompt, answer) is None, length
        async with openai.AsyncOpenAI(base_url=f"{mesh.http}/v1", api_key="none") as client:
            chat = await client.chat.completions.create(
                model=model.name, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
            )
            plain = await client.completions.create(model=model.name, prompt=RENDERED, max_tokens=1)
        assert chat.usage is not None
        assert plain.usage is not None
        assert chat.usage.prompt_tokens == plain.usage.prompt_tokens
