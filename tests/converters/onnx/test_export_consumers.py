"""onnxruntime-genai, optimum and transformers.js load the folder as it is and generate hard PyTorch's tokens.

Each lives in an environment of its own, named by a variable; these tests run when their marker is chosen:

    EDKM_GENAI_PYTHON=venv/bin/python          pytest -m genai           # pip install onnxruntime-genai
    EDKM_OPTIMUM_PYTHON=venv/bin/python        pytest -m optimum         # pip install optimum-onnx[onnxruntime]
    EDKM_TRANSFORMERSJS=folder/with/node_modules  pytest -m transformersjs  # npm install @huggingface/transformers
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.onnx.read.executors import Optimization
from converters.onnx.read.session import OnnxSession
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.reference.tokenizer_files import tokenizer_files
from tests.helpers.exports import palettized_folder
from tests.helpers.onnx_models import export

PROMPT = [5, 9, 31, 33, 4, 7, 64, 8]
COUNT = 32

GENAI = """
import json, sys
import onnxruntime_genai as og
folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
settings = og.GeneratorParams(model)
settings.set_search_options(do_sample=False, max_length=len(prompt) + count)
generator = og.Generator(model, settings)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(prompt):]))
"""

OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, prompt, count = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
found = model.generate(
    input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count
)
print(json.dumps(found[0, prompt.shape[1]:].tolist()))
"""

TRANSFORMERS_JS = """
import { env, AutoModelForCausalLM, Tensor } from '@huggingface/transformers';
import path from 'node:path';
const [folder, prompt, count] = [process.argv[2], JSON.parse(process.argv[3]), +process.argv[4]];
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const model = await AutoModelForCausalLM.from_pretrained(path.basename(folder));
const ids = BigInt64Array.from(prompt.map(BigInt));
const found = await model.generate({
    inputs: new Tensor('int64', ids, [1, ids.length]),
    attention_mask: new Tensor('int64', ids.map(() => 1n), [1, ids.length]),
    do_sample: false,
    max_new_tokens: count,
});
console.log(JSON.stringify(Array.from(found.data).map(Number).slice(prompt.length)));
"""

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
CHAT = r"""
import { AutoTokenizer, env } from '@huggingface/transformers';
import path from 'node:path';
const folder = process.argv[2];
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
const found = tokenizer.apply_chat_template([{ role: 'user', content: 'Hello' }], { tokenize: false });
console.log(JSON.stringify(found));
"""

FORMS = [
    ("int8", {"runtime": "exact"}),
    ("int8", {"runtime": "low-memory"}),
    ("int8", {"runtime": "fast"}),
    ("int4", {"runtime": "fast"}),
    ("int8", {"runtime": "exact", "dtype": "float16"}),
]


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, tmp_path_factory) -> dict[str, Checkpoint]:
    """By the grid of their LUTs."""
    path = tmp_path_factory.mktemp("tiny")
    return {
        grid: palettized_folder(tiny_llama, uniform_recipe(3, 16, grid), path / f"{grid}.pt")
        for grid in ("int8", "int4")
    }


def greedy(next_token: Callable[[list[int]], int]) -> list[int]:
    """Tokens behind the prompt."""
    tokens = list(PROMPT)
    for _ in range(COUNT):
        tokens.append(next_token(tokens))
    return tokens[len(PROMPT) :]


def by_session(folder: Path, optimization: Optimization) -> list[int]:
    session = OnnxSession.open(folder, optimization=optimization)

    def next_token(tokens: list[int]) -> int:
        new = tokens if len(tokens) == len(PROMPT) else tokens[-1:]
        return int(session.feed(torch.tensor(new))[-1].argmax())

    return greedy(next_token)


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: "-".join([form[0], *form[1].values()]))
def exported(request, checkpoints, tmp_path_factory) -> tuple[Path, list[int]]:
    """A folder, and the tokens to expect: hard PyTorch's.

    `fast` rounds activations, unless onnxruntime is told not to optimize, and may choose otherwise where two tokens are
    near. Then hard PyTorch's tokens are those of the unoptimized graph, and others are to generate what ours does.
    """
    grid, options = request.param
    model = load_hard_model(checkpoints[grid])
    folder = export(checkpoints[grid], tmp_path_factory.mktemp("onnx") / "model", **options)
    with torch.no_grad():
        expected = greedy(lambda tokens: int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    if options["runtime"] != "fast":
        return folder, expected
    assert by_session(folder, "disabled") == expected
    return folder, by_session(folder, "all")


def place(variable: str) -> str:
    if not (found := os.environ.get(variable)):
        pytest.fail(f"{variable} does not say where it is installed")
    return found


def run(command: list[str], folder: Path, **options) -> list[int]:
    done = subprocess.run(
        [*command, str(folder), json.dumps(PROMPT), str(COUNT)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.genai
def test_onnxruntime_genai(exported):
    folder, expected = exported
    assert run([place("EDKM_GENAI_PYTHON"), "-c", GENAI], folder) == expected


@pytest.mark.optimum
def test_optimum(exported):
    folder, expected = exported
    assert run([place("EDKM_OPTIMUM_PYTHON"), "-c", OPTIMUM], folder) == expected


@pytest.mark.transformersjs
def test_transformers_js(exported, tmp_path):
    folder, expected = exported
    modules = Path(place("EDKM_TRANSFORMERSJS"))
    (tmp_path / "node_modules").symlink_to((modules / "node_modules").resolve())
    script = tmp_path / "run.mjs"
    script.write_text(TRANSFORMERS_JS)
    assert run(["node", str(script)], folder) == expected


@pytest.mark.transformersjs
def test_transformers_js_applies_the_chat_template(tiny_llama, tmp_path):
    source = Source.parse(str(tiny_llama))
    tokenizer, model = load_tokenizer(source), load_model(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in tokenizer_files(tokenizer, model).items():
        if name != "chat_template.jinja":  # what older versions read is enough
            (folder / name).write_bytes(content)
    modules = Path(place("EDKM_TRANSFORMERSJS"))
    (tmp_path / "node_modules").symlink_to((modules / "node_modules").resolve())
    script = tmp_path / "chat.mjs"
    script.write_text(CHAT)
    done = subprocess.run(["node", str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == "<user> Hello\n"
